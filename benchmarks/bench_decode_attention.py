"""Decode attention beside SDPA, in bandwidth: the cache is all there is to read.

pytest benchmarks/bench_decode_attention.py -s
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastigpt.kernels import launch
from gpu_time import copies_needed, graph_seconds

KEYS = 1024
SHAPES = {"small": (8, 64), "large": (16, 96), "medium": (8, 128)}


def one(n: int, heads: int, head_dim: int, window: int, dtype: torch.dtype, configs: launch.Table, config=None):
    """Calls on enough caches to be cold, and the bytes one of them reads."""
    from fastigpt.kernels.decode_attention import decode_attention

    scaled = dtype in launch.SCALED_TYPES
    size = 2 * n * heads * KEYS * (head_dim * dtype.itemsize + (4 if scaled else 0))
    device = torch.device("cuda")
    slots = torch.full((n,), KEYS - window, dtype=torch.int32, device=device)
    q = torch.randn(n, window, heads, head_dim, device=device).bfloat16()
    calls = []
    for _ in range(copies_needed(size)):
        k, v = (torch.randn(n, heads, KEYS, head_dim, device=device).to(dtype) for _ in range(2))
        scales = [torch.rand(n, heads, KEYS, device=device) if scaled else None for _ in range(2)]
        out = torch.empty_like(q)
        calls.append(
            partial(
                decode_attention, q, k, v, slots, configs=configs, k_scale=scales[0], v_scale=scales[1], out=out,
                config=config,
            )
        )  # fmt: skip
    return calls, size


def sdpa(n: int, heads: int, head_dim: int):
    size = 4 * n * heads * KEYS * head_dim
    q = torch.randn(n, heads, 1, head_dim, device="cuda").bfloat16()
    calls = []
    for _ in range(copies_needed(size)):
        k, v = (torch.randn(n, heads, KEYS, head_dim, device="cuda").bfloat16() for _ in range(2))
        calls.append(partial(F.scaled_dot_product_attention, q, k, v))
    return calls, size


def measure(bandwidth: float) -> list[dict[str, object]]:
    """Rows of name, microseconds, share of the bandwidth measured in this run, and SDPA's share where it can do it."""
    configs = launch.table(launch.family(torch.device("cuda")))
    types = [torch.bfloat16, torch.int8] + [torch.float8_e4m3fn] * launch.stores_float8(torch.device("cuda"))
    work = [(name, n, 1, torch.bfloat16) for name in SHAPES for n in (1, 64)]
    work += [("small", 64, 1, t) for t in types[1:]] + [("small", 64, w, torch.bfloat16) for w in (4, 16, 64)]
    rows = []
    for name, n, window, dtype in work:
        heads, head_dim = SHAPES[name]
        calls, size = one(n, heads, head_dim, window, dtype, configs)
        seconds = graph_seconds(calls)
        row = {"work": f"decode_attention {name} n={n} W={window} {str(dtype).removeprefix('torch.')}",
               "microseconds": seconds * 1e6, "share_of_bandwidth": size / seconds / bandwidth}  # fmt: skip
        if window == 1 and dtype == torch.bfloat16:
            calls, size = sdpa(n, heads, head_dim)
            row["sdpa_microseconds"] = graph_seconds(calls) * 1e6
        rows.append(row)
    return rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def bench_decode_attention(machine):
    for row in measure(machine.bandwidth):
        print(row)
