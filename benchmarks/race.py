"""Times an operator on the CPU beside its peers: a round of each in turn, in one process, on inputs as cold as in use,
and sets the figures beside the machine's limits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from fastigpt.bench.machine import Machine
from fastigpt.bench.timing import Calls, timed, typical

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="operators on the CPU are measured where there is no GPU")


def on_gpu(function):
    """Marks a benchmark that needs a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(function))


def rows_on_gpu(benchmark, measure: Callable[[float], list[dict[str, object]]], limit: float) -> None:
    """measure(limit): rows of figures beside a limit of the machine, which time themselves."""
    rows = benchmark.pedantic(measure, args=(limit,), rounds=1)
    benchmark.extra_info["rows"] = rows
    print(*rows, sep="\n")


def each(calls: Calls) -> None:
    for call in calls:
        call()


def race(
    benchmark, machine: Machine, ours: Calls, peers: dict[str, Calls], *, moved: float, operations: float,
    dtype: torch.dtype, rounds: int = 7,
) -> None:  # fmt: skip
    """ours, peers: the same work on different inputs; a round is all of them. moved, operations: bytes and operations
    of one call. dtype: in which the products are at best computed."""
    times: dict[str, list[float]] = {name: [] for name in peers}

    def peers_first() -> None:
        for name, calls in peers.items():
            calls[0]()  # whoever ran before leaves threads and caches that are not this peer's
            times[name].append(timed(partial(each, calls))[1] / len(calls))
        ours[0]()

    peers_first()
    each(ours)
    for found in times.values():
        found.clear()
    benchmark.pedantic(partial(each, ours), setup=peers_first, rounds=rounds)
    median, spread = typical([seconds / len(ours) for seconds in benchmark.stats.stats.data])
    floor = max(moved / machine.bandwidth, operations / machine.gemm[str(dtype).removeprefix("torch.")])
    figures: dict[str, object] = {
        "bytes": moved,
        "operations": operations,
        "microseconds": round(1e6 * median, 1),
        "floor_microseconds": round(1e6 * floor, 1),
        "share_of_floor": round(floor / median, 3),
    }
    for name, found in times.items():
        theirs, theirs_spread = typical(found)
        figures[f"{name}, microseconds"] = round(1e6 * theirs, 1)
        apart = abs(theirs / median - 1) > spread + theirs_spread
        figures[f"times {name}"] = round(theirs / median, 2) if apart else "within noise"
    benchmark.extra_info.update(figures)
    print("\n   ", benchmark.name, figures)
