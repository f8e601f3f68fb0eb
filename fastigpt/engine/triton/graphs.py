"""Launches of several threads, and their capture in CUDA graphs.

Only here, and only while launches are made, does one session wait for another: never while a GPU works or while rows
are handed out.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastigpt.kernels.launching import launching as alone


@contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Whoever launches kernels of an engine does it in here: alone in this process, on `device`, without autograd."""
    with alone(device), torch.inference_mode():
        yield


def capture(run: Callable[[], None], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A graph of what `run` launches; nothing of it runs now. Every kernel must have been launched before, as compiling
    and loading one is nothing that can be captured.

    The graph works in the memory of whoever captures, and shares no pool: what little `run` allocates is the graph's
    own, and torch refuses a pool whose graphs are all gone while cuBLAS's workspace is still in it. stream: of the
    session alone; torch's default would be one for all GPUs and threads.
    """
    with launching(stream.device):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # The collector might free another graph or event in here, which is no call for the time of a capture.
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                run()
        finally:
            if collecting:
                gc.enable()
    return graph
