"""Norm + linear beside cuBLAS with separate norm and ending, over rows: where the one stops being faster is data for
fastigpt/kernels/configs.

    pytest benchmarks/bench_norm_linear.py --benchmark-only -s
"""

from __future__ import annotations

from functools import partial

import torch
from race import on_gpu, rows_on_gpu

from fastigpt.bench.timing import copies_needed, graph_seconds
from fastigpt.kernels import launch

WIDTHS = {"small": 512, "medium": 1024, "large": 1536}
LAYERS = {"qkv": (1, 3), "proj": (1, 1), "fc": (1, 4), "out": (4, 1)}  # inputs and outputs, in widths
ROWS = (1, 8, 16, 32, 64, 128, 256, 512)
FEW_ROWS = (1, 64)  # of the larger shapes


def one(layer: str, width: int, rows: int, configs: launch.Table, config=None):
    """Calls on cold weights, and the bytes of those. layer: "qkv" or "fc", after a norm, the second before quick-GELU;
    "proj" or "out", before the sum with the residual stream."""
    from fastigpt.kernels.norm_linear import norm_linear

    inside, outside = (width * times for times in LAYERS[layer])
    normed = layer in ("qkv", "fc")
    gain = torch.rand(width, device="cuda") if normed else None
    x = torch.randn(rows, inside, device="cuda")
    x = x if normed else x.bfloat16()
    out = torch.zeros(rows, outside, device="cuda", dtype=torch.bfloat16 if normed else torch.float32)
    scratch = torch.empty(rows * (inside + outside), device="cuda", dtype=torch.bfloat16)
    size = 2 * inside * outside
    calls = [
        partial(
            norm_linear, x, torch.randn(outside, inside, device="cuda").bfloat16() / inside**0.5, out,
            configs=configs, gain=gain, activation="quick_gelu" if layer == "fc" else None, residual=not normed,
            scratch=scratch, config=config,
        )
        for _ in range(copies_needed(size, "cuda"))
    ]  # fmt: skip
    return calls, size


def measure(bandwidth: float) -> list[dict[str, object]]:
    """Rows of name, microseconds with the kernel and with cuBLAS, share of the bandwidth for the weights."""
    table = launch.table(launch.family(torch.device("cuda")))
    kernel, cublas = ({**table, "cublas": [{"from_rows": rows}]} for rows in (10**9, 1))
    rows = []
    for name, width in WIDTHS.items():
        for count in ROWS if name == "small" else FEW_ROWS:
            for layer in ("fc", "out"):
                calls, size = one(layer, width, count, kernel)
                seconds = graph_seconds(calls)
                peer = graph_seconds(one(layer, width, count, cublas)[0])
                rows.append(
                    {"work": f"norm_linear {layer} {name} rows={count}", "microseconds": seconds * 1e6,
                     "share_of_bandwidth": size / seconds / bandwidth, "cublas_microseconds": peer * 1e6}
                )  # fmt: skip
    return rows


@on_gpu
def bench_on_gpu(benchmark, machine):
    rows_on_gpu(benchmark, measure, machine.bandwidth)
