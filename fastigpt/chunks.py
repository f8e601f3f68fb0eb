"""Large jobs a chunk at a time, so that what a job holds besides its results does not grow with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

MOST = 4096
"""Images of a chunk; more at a time do not make any device faster."""


@dataclass(frozen=True)
class Repeated:
    """The rows of a tensor, each `times` times in a row, made when they are asked for."""

    rows: torch.Tensor
    times: int = 1

    def __len__(self) -> int:
        return len(self.rows) * self.times

    def chunk(self, items: range) -> torch.Tensor:
        return self.rows[torch.arange(items.start, items.stop, device="cpu") // self.times]


def chunks(count: int, batch_size: int | None) -> Iterator[range]:
    """Ranges of at most MOST images that cover 0 … count − 1, whole batches each; a larger batch is one chunk."""
    step = max(batch_size, MOST // batch_size * batch_size) if batch_size else MOST
    for first in range(0, count, step):
        yield range(first, min(first + step, count))
