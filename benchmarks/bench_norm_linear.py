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
ROWS = (1, 8, 16, 32, 64, 128, 256, 512)
FEW_ROWS = (1, 64)  # of the larger shapes


def one(layer: str, width: int, rows: int, configs: launch.Table, config=None):
    """Calls on cold weights, and the bytes of those. layer: "fc" (norm, quick-GELU) or "out" (residual)."""
    from fastigpt.kernels.norm_linear import norm_linear

    inside, outside = (width, 4 * width) if layer == "fc" else (4 * width, width)
    gain = torch.rand(width, device="cuda") if layer == "fc" else None
    x = torch.randn(rows, inside, device="cuda")
    x = x if layer == "fc" else x.bfloat16()
    out = torch.zeros(rows, outside, device="cuda", dtype=torch.bfloat16 if layer == "fc" else torch.float32)
    scratch = torch.empty(rows * (inside + outside), device="cuda", dtype=torch.bfloat16)
    size = 2 * inside * outside
    calls = [
        partial(
            norm_linear, x, torch.randn(outside, inside, device="cuda").bfloat16() / inside**0.5, out,
            configs=configs, gain=gain, gelu=layer == "fc", residual=layer == "out", scratch=scratch, config=config,
        )
        for _ in range(copies_needed(size, "cuda"))
    ]  # fmt: skip
    return calls, size


def measure(bandwidth: float) -> list[dict[str, object]]:
    """Rows of name, microseconds with the kernel and with cuBLAS, share of the bandwidth for the weights."""
    table = launch.table(launch.family(torch.device("cuda")))
    cublas = {**table, "cublas": [{"from_rows": 1}]}
    rows = []
    for name, width in WIDTHS.items():
        for count in ROWS if name == "small" else FEW_ROWS:
            for layer in ("fc", "out"):
                config = launch.settings(table, "norm_linear", count)
                calls, size = one(layer, width, count, table, config)
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
