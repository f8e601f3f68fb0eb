"""How long work takes on any device: the one timer of `fastigpt bench`, of benchmarks/ and of the acceptance run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fastigpt.engine.memory import synchronize

Result = TypeVar("Result")
Calls = Sequence[Callable[[], object]]

_COLD_BYTES = {"cuda": 200 << 20, "cpu": 128 << 20}  # more than the caches of the devices this runs on


def timed(work: Callable[[], Result], device: torch.device | str = "cpu", times: int = 1) -> tuple[Result, float]:
    """What the last of `times` calls returned, and seconds of one call. On a GPU from the end of the work before to the
    end of this work, not to its launch."""
    place = torch.device(device)
    synchronize(place)
    started = time.perf_counter()
    for _ in range(times):
        result = work()
    synchronize(place)
    return result, (time.perf_counter() - started) / times


def repeat(work: Callable[[], object], device: torch.device | str, repeats: int, inner: int = 1) -> list[float]:
    """Seconds of one call, `repeats` times, each averaged over `inner` calls; after one that warms up."""
    work()
    return [timed(work, device, inner)[1] for _ in range(repeats)]


def typical(times: Sequence[float]) -> tuple[float, float]:
    """The median, and half the distance between the quartiles over it."""
    ordered = sorted(times)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    middle = statistics.median(ordered)
    return middle, (high - low) / 2 / middle


def copies_needed(size: int, device: torch.device | str = "cpu") -> int:
    """How many copies of `size` bytes of input to cycle through, so that none is in a cache when its turn comes."""
    return max(1, min(64, -(-_COLD_BYTES[torch.device(device).type] // max(1, size))))


def graph_seconds(calls: Calls, *, repeats: int = 5, at_least: float = 0.01) -> float:
    """Median seconds of one call on a GPU, without the cost of launching it. calls: the same work on different inputs,
    captured into one CUDA graph in turn; `repeats` times it is replayed for `at_least` seconds."""
    from fastigpt.engine.triton.graphs import capture, launching

    def all_of_them() -> None:
        for call in calls:
            call()

    with launching(torch.device("cuda")):
        for call in calls[:2]:
            call()  # compiles, outside the capture
        graph = capture(all_of_them, torch.cuda.Stream())
    graph.replay()
    estimate = timed(graph.replay, "cuda", 2)[1]
    times = max(1, round(at_least / max(1e-6, estimate)))
    return statistics.median(repeat(graph.replay, "cuda", repeats, times)) / len(calls)
