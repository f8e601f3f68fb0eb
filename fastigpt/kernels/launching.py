"""Who launches kernels does it alone: engines in any number of threads, operators, and whoever captures a graph.

Triton compiles a kernel when it is first launched. Two threads that compile at once meet a fault of CPython 3.11
("AST constructor recursion depth mismatch"), its interpreter changes triton.language while a kernel runs, and a capture
must be alone. Nobody waits for a GPU in here, only for launches.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ALONE = threading.RLock()  # one for the process


@contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Alone in this process, with `device` as the current one, which is where Triton launches whatever its arguments
    are on."""
    with _ALONE:
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield
