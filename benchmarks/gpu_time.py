"""Times GPU work by replaying a CUDA graph of it: no launch cost, no synchronisation in between, and caches as cold
as in use, for the work cycles through more data than the L2 cache holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 200 << 20  # an H200's L2 cache is 50 MB


def copies_needed(size: int) -> int:
    """How many copies of `size` bytes of input to cycle through, so that none is still in the cache when its turn
    comes.
    """
    return max(1, min(64, -(-COLD_BYTES // max(1, size))))


def graph_seconds(calls: Sequence[Callable[[], object]], *, repeats: int = 5, at_least: float = 0.01) -> float:
    """Median seconds of one call. `calls`: the same work on different inputs, captured into one graph in turn."""
    for call in calls[:2]:
        call()  # compiles, outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay(times: int) -> float:
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    replay(1)
    times = max(1, round(at_least / max(1e-6, replay(2) / 2)))
    return statistics.median(replay(times) for _ in range(repeats)) / times / len(calls)
