"""Times an operator on the CPU beside its peers: a round of each in turn, in one process, on inputs as cold as in use,
and sets the figures beside the machine's limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch

from fastigpt.bench.machine import Machine, typical

COLD_BYTES = 128 << 20  # more than the caches of the processors this runs on
Calls = Sequence[Callable[[], object]]

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="operators on the CPU are measured where there is no GPU")


def copies_needed(size: int) -> int:
    """How many copies of `size` bytes of input to cycle through, so that none is in a cache when its turn comes."""
    return max(1, min(64, -(-COLD_BYTES // max(1, size))))


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
            started = time.perf_counter()
            for call in calls:
                call()
            times[name].append((time.perf_counter() - started) / len(calls))
        ours[0]()

    def one_round() -> None:
        for call in ours:
            call()

    peers_first()
    one_round()
    for found in times.values():
        found.clear()
    benchmark.pedantic(one_round, setup=peers_first, rounds=rounds)
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
