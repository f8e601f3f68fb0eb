"""The sampling head, from hidden states to tokens, in microseconds: on a GPU one launch, on a CPU beside the plain
pipeline of norm, head, filters, softmax and multinomial.

pytest benchmarks/bench_sample_head.py --benchmark-only -s
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from race import on_cpu, on_gpu, race, rows_on_gpu

import fastigpt.ops as ops
from fastigpt.bench.timing import copies_needed, graph_seconds
from fastigpt.kernels import launch
from fastigpt.sampling import Drawing, filter_logits

N_COLORS, N_POSITIONS = 512, 1024
SIZES = (  # images, window and tokens of what is measured on a GPU
    (1, 1, N_COLORS), (1, 16, N_COLORS), (64, 1, N_COLORS), (64, 8, N_COLORS), (512, 1, N_COLORS), (1, 1, 16384),
    (64, 1, 16384),
)  # fmt: skip


def one(n: int, window: int, drawing: Drawing, configs: launch.Table, n_tokens: int, width: int = 512):
    """A call that draws and moves nothing on."""
    from fastigpt.kernels.canvases import Canvases, Head, Steps, repeated
    from fastigpt.kernels.sample_head import make_scratch, sample_head

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    gain, index = torch.ones(width, device="cuda"), torch.arange(n, device="cuda")
    head = Head(gain, normal(n_tokens, width), normal(n_tokens, width), normal(N_POSITIONS, width), 1e-5)
    idle = Canvases.idle(n, N_POSITIONS, "cuda")
    canvases = replace(idle, end=idle.end + N_POSITIONS, index=index, drawings=repeated(drawing, n, "cuda"))
    steps = Steps.of([drawing], n_tokens)
    x = torch.randn(n * window, width, device="cuda")
    scratch = make_scratch(n, window, head, steps, configs)
    inputs = torch.zeros((n, window), dtype=torch.int32, device="cuda")
    return partial(sample_head, x, inputs, head, canvases, scratch, steps, configs=configs, advance=False)


def measure(bandwidth: float) -> list[dict[str, object]]:
    configs = launch.table(launch.family(torch.device("cuda")))
    rows: list[dict[str, object]] = []
    for n, window, tokens in SIZES:
        for name, drawing in (("", Drawing()), (" top_k top_p", Drawing(top_k=100, top_p=0.9))):
            seconds = graph_seconds([one(n, window, drawing, configs, tokens)])
            rows.append({"work": f"sample_head {tokens} n={n} W={window}{name}", "microseconds": seconds * 1e6})
    return rows


@on_gpu
def bench_on_gpu(benchmark, machine):
    rows_on_gpu(benchmark, measure, machine.bandwidth)


@on_cpu
@pytest.mark.parametrize("filters", [{}, {"top_k": 100, "top_p": 0.9}], ids=["", "top_k top_p"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, 64])
def bench_on_cpu(benchmark, machine, n, dtype, filters, width: int = 512):
    """The peer's products and logits are of the weights' dtype, ours float32."""
    benchmark.group = f"sample head, n={n}, {str(dtype).removeprefix('torch.')}, {' '.join(filters) or 'no filters'}"
    hidden, gain = torch.randn(n, width).to(dtype), torch.ones(width, dtype=dtype)
    index, position, drawing = torch.arange(n), torch.arange(n), Drawing(**filters)

    def pipeline(weight: torch.Tensor) -> torch.Tensor:
        logits = F.linear(F.rms_norm(hidden, (width,), gain, 1e-5), weight).float()
        return torch.multinomial(filter_logits(logits, drawing).softmax(-1), 1)[:, 0]

    size = N_COLORS * width * dtype.itemsize
    weights = [(torch.randn(N_COLORS, width) / width**0.5).to(dtype) for _ in range(copies_needed(size))]
    ours = [partial(ops.sample_head, hidden, gain, w, index, position, 0, **filters) for w in weights]
    race(
        benchmark, machine, ours, {"plain PyTorch": [partial(pipeline, w) for w in weights]},
        moved=size + n * width * dtype.itemsize, operations=2 * n * N_COLORS * width, dtype=dtype,
    )  # fmt: skip
