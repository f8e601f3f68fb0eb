"""The machine's limits, measured: how fast memory is read and how fast matrices are multiplied, on any torch device."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastigpt import _C
from fastigpt.bench.timing import repeat

_GEMM_ROWS, _GEMM_SIDE = 512, 2048  # on a CPU
_CUDA_SIDE, _CUDA_BYTES = 8192, 1 << 30  # of the products' matrices, and of what is copied, on a GPU
_REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """name: processor or GPU. threads: used on a CPU. bandwidth: bytes read per second. gemm: operations per second of
    a matrix product by dtype name (torch's own), the highest seen in `_REPEATS` repetitions; spread: their lowest over
    it."""

    name: str
    threads: int
    bandwidth: float
    gemm: dict[str, float]
    spread: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def measure_machine(device: torch.device, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> Machine:
    """Takes a second or two. Rates move on a shared machine: measure again beside whatever is compared."""
    bandwidths = (
        _cuda_bandwidths(device) if device.type == "cuda" else _C.read_bandwidth(512 << 20, _threads(), _REPEATS)
    )
    gemm, spread = {}, {"bandwidth": min(bandwidths) / max(bandwidths)}
    for dtype in dtypes:
        rates = _gemm_rates(device, dtype)
        name = str(dtype).removeprefix("torch.")
        gemm[name], spread[name] = max(rates), min(rates) / max(rates)
    return Machine(device_name(device), _threads(), max(bandwidths), gemm, spread)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gemm_rates(device: torch.device, dtype: torch.dtype) -> list[float]:
    side = _GEMM_SIDE if device.type == "cpu" else _CUDA_SIDE
    rows = _GEMM_ROWS if device.type == "cpu" else side
    a = torch.randn(rows, side, device=device).to(dtype)
    b = torch.randn(side, side, device=device).to(dtype)
    times = repeat(lambda: torch.mm(a, b), device, _REPEATS, inner=4)
    return [2.0 * rows * side * side / seconds for seconds in times]


def _cuda_bandwidths(device: torch.device) -> list[float]:
    """Of a copy, which reads and writes: bytes moved per second."""
    source = torch.empty(_CUDA_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return [
        2 * source.numel() / seconds for seconds in repeat(lambda: target.copy_(source), device, _REPEATS, inner=10)
    ]
