"""Decode attention beside SDPA, on a GPU beside FlexAttention and FlashInfer too, in bandwidth: the cache is all there
is to read.

pytest benchmarks/bench_decode_attention.py --benchmark-only -s
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from decode_peers import PEERS, why_not, wrong
from race import on_cpu, on_gpu, race, rows_on_gpu

import fastigpt.ops as ops
from fastigpt.bench.timing import copies_needed, graph_seconds
from fastigpt.kernels import launch

DEVICE = "cuda"
KEYS = 1024
SHAPES = {"small": (8, 64), "large": (16, 96), "medium": (8, 128)}
IMAGES = {1: 1, 64: 64}  # by the number in the name of the work
WINDOWS = (4, 16, 64)
TOLERANCE = 2e-2  # of the largest result, for peers


def one(
    n: int, heads: int, head_dim: int, window: int, dtype: torch.dtype, configs: launch.Table, config=None, keys=None
):
    """Calls on enough caches to be cold, and the bytes one of them reads. keys: that there are, of KEYS."""
    from fastigpt.kernels.decode_attention import decode_attention

    scaled = dtype in launch.SCALED_TYPES
    size = 2 * n * heads * KEYS * (head_dim * dtype.itemsize + (4 if scaled else 0))
    device = torch.device("cuda")
    slots = torch.full((n,), (keys or KEYS) - window, dtype=torch.int32, device=device)
    q = torch.randn(n, window, heads, head_dim, device=device).bfloat16()
    calls = []
    for _ in range(copies_needed(size, "cuda")):
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


def peers(n: int, heads: int, head_dim: int) -> dict[str, object]:
    """Microseconds of each peer at the same work on caches that are as cold, or why there are none."""
    found: dict[str, object] = {}
    shape, copies = (n, heads, KEYS, head_dim), copies_needed(4 * n * heads * KEYS * head_dim, DEVICE)
    q = torch.randn(n, heads, 1, head_dim, device=DEVICE).bfloat16()
    caches = [[torch.randn(shape, device=DEVICE).bfloat16() for _ in range(2)] for _ in range(copies)]
    for name, prepare in PEERS.items():
        reason = why_not(name, head_dim)
        if reason is None:
            calls = [prepare(q, k, v) for k, v in caches]
            off = wrong(calls[0], q, *caches[0])
            if not off <= TOLERANCE:
                reason = f"is wrong by {off:.2g} of the largest result"
        found[f"{name}_microseconds"] = reason or graph_seconds(calls) * 1e6
    return found


def measure(bandwidth: float) -> list[dict[str, object]]:
    """Rows of name, microseconds, share of the bandwidth measured in this run, and the peers' microseconds at what they
    can do: one query, a 16-bit cache."""
    configs = launch.table(launch.family(torch.device("cuda")))
    types = [torch.bfloat16, torch.int8] + [torch.float8_e4m3fn] * launch.stores_float8(torch.device("cuda"))
    most = max(IMAGES)
    work = [(name, n, 1, torch.bfloat16) for name in SHAPES for n in IMAGES]
    work += [("small", most, 1, t) for t in types[1:]] + [("small", most, w, torch.bfloat16) for w in WINDOWS]
    rows = []
    for name, n, window, dtype in work:
        heads, head_dim = SHAPES[name]
        calls, size = one(IMAGES[n], heads, head_dim, window, dtype, configs)
        seconds = graph_seconds(calls)
        row: dict[str, object] = {
            "work": f"decode_attention {name} n={n} W={window} {str(dtype).removeprefix('torch.')}",
            "microseconds": seconds * 1e6,
            "share_of_bandwidth": size / seconds / bandwidth,
        }
        if window == 1 and dtype == torch.bfloat16:
            row |= peers(IMAGES[n], heads, head_dim)
        rows.append(row)
    return rows


@on_gpu
def bench_on_gpu(benchmark, machine):
    rows_on_gpu(benchmark, measure, machine.bandwidth)


CASES = {  # images, window, dtype of the cache, positions: one for all, or spread from an eighth of the canvas to it
    "n=1 float32": (1, 1, torch.float32, "one"),
    "n=1 bfloat16": (1, 1, torch.bfloat16, "one"),
    "n=1 W=8 bfloat16": (1, 8, torch.bfloat16, "one"),
    "n=64 float32": (64, 1, torch.float32, "one"),
    "n=64 bfloat16": (64, 1, torch.bfloat16, "one"),
    "n=64 int8": (64, 1, torch.int8, "one"),
    "n=64 W=8 bfloat16": (64, 8, torch.bfloat16, "one"),
    "n=64 float32 spread": (64, 1, torch.float32, "spread"),
    "n=64 bfloat16 spread": (64, 1, torch.bfloat16, "spread"),
}


@on_cpu
@pytest.mark.parametrize("case", CASES)
def bench_on_cpu(benchmark, machine, case, position: int = 512):
    """One layer's step of small, the appending included; queries are bfloat16 where the cache is not float32. The peer
    appends by slices, or by index where positions differ, and hands SDPA the slots in use; an int8 cache it has to turn
    into bfloat16 first."""
    benchmark.group = f"decode attention, small, {case}"
    n, window, cache_dtype, kind = CASES[case]
    heads, head_dim = SHAPES["small"]
    dtype = torch.float32 if cache_dtype == torch.float32 else torch.bfloat16
    starts = torch.linspace(position / 4, position, n).int() if kind == "spread" else torch.full((n,), position).int()
    end, image = int(starts.max()) + window, torch.arange(n)[:, None]
    slots = starts.long()[:, None] + torch.arange(window)
    seen = (torch.arange(end) <= slots[..., None])[:, None]  # [n, 1, W, end]
    mask = seen if kind == "spread" or window > 1 else None
    q, k, v = (torch.randn(n, window, heads, head_dim).to(dtype) for _ in range(3))
    scaled = cache_dtype == torch.int8
    keys_read = int((starts + window).sum()) * heads
    moved = 2 * keys_read * (head_dim * cache_dtype.itemsize + (4 if scaled else 0))

    def sdpa(k_cache, v_cache, k_scale, v_scale):
        for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
            if scaled:
                factor = x.float().abs().amax(-1) / 127.0
                scale[:, :, position : position + window] = factor.transpose(1, 2)
                x = (x.float() / factor[..., None]).round().to(torch.int8)
            if kind == "spread":
                cache[image, :, slots] = x
            else:
                cache[:, :, position : position + window] = x.transpose(1, 2)
        keys, values = k_cache[:, :, :end], v_cache[:, :, :end]
        if scaled:
            keys, values = (
                x.to(dtype) * s[:, :, :end, None].to(dtype) for x, s in ((keys, k_scale), (values, v_scale))
            )
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask).transpose(1, 2)

    ours, theirs = [], []
    for _ in range(copies_needed(moved)):
        caches = [torch.randn(n, heads, KEYS, head_dim).mul(20 if scaled else 1).to(cache_dtype) for _ in range(2)]
        scales = [torch.rand(n, heads, KEYS) / 20 if scaled else None for _ in range(2)]
        options = {"k_scale": scales[0], "v_scale": scales[1]} if scaled else {}
        ours.append(partial(ops.decode_attention, q, k, v, *caches, starts, **options))
        theirs.append(partial(sdpa, *caches, *scales))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours[0](), theirs[0](), atol=tolerance, rtol=tolerance)
    race(
        benchmark, machine, ours, {"SDPA": theirs},
        moved=moved, operations=4 * keys_read * window * head_dim, dtype=dtype,
    )  # fmt: skip
