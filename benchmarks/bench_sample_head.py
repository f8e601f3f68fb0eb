"""The sampling head: one launch from hidden states to the next inputs, in microseconds.

pytest benchmarks/bench_sample_head.py -s
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fastigpt.kernels import launch
from gpu_time import graph_seconds

from fastigpt.engine import Drawing

N_COLORS, N_PIXELS = 512, 1024


def one(n: int, window: int, drawing: Drawing, configs: launch.Table, width: int = 512):
    """A call that draws and moves nothing on."""
    from fastigpt.kernels.sample_head import Head, State, make_scratch, sample_head, set_drawing

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="cuda")

    gain, index = torch.ones(width, device="cuda"), torch.arange(n, device="cuda")
    head = Head(gain, normal(N_COLORS, width), normal(N_COLORS + 1, width), normal(N_PIXELS, width), 1e-5)
    integers, numbers = zeros(2, dtype=torch.int64), zeros(3, dtype=torch.float32)
    starts = zeros(n, N_PIXELS, dtype=torch.int8)
    state = State(zeros(n, N_PIXELS) - 1, starts, zeros(n), zeros(n), zeros(n), index, integers, numbers)
    set_drawing(state.integers, state.numbers, drawing, N_COLORS)
    x = torch.randn(n * window, width, device="cuda")
    scratch = make_scratch(n, window, N_COLORS, x.device)
    inputs = zeros(n, window)
    return partial(sample_head, x, inputs, head, state, scratch, drawing, configs=configs, advance=False)


def measure(bandwidth: float) -> list[dict[str, object]]:
    configs = launch.table(launch.family(torch.device("cuda")))
    rows: list[dict[str, object]] = []
    for n, window in ((1, 1), (1, 16), (64, 1), (64, 8), (512, 1)):
        for name, drawing in (("", Drawing()), (" top_k top_p", Drawing(top_k=100, top_p=0.9))):
            seconds = graph_seconds([one(n, window, drawing, configs)])
            rows.append({"work": f"sample_head n={n} W={window}{name}", "microseconds": seconds * 1e6})
    return rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def bench_sample_head(machine):
    for row in measure(machine.bandwidth):
        print(row)
