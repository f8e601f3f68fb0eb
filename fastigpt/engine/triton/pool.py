"""What an engine keeps from session to session: idle batches with their graphs, and what windows were found to cost."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from fastigpt.engine.memory import free_memory
from fastigpt.engine.triton.batch import Batch, batch_bytes, bucket
from fastigpt.engine.triton.draft import Draft
from fastigpt.engine.triton.graphs import launching
from fastigpt.engine.triton.weights import Model
from fastigpt.engine.window import WindowStatistics

MEMORY_SHARE = 0.85  # of the free memory, for sessions
_IDLE = 2  # batches that are kept


class Pool:
    """Of one engine. Batches are taken out while in use: any number of sessions have one each, and no more than two
    outlive their sessions. Nothing in a batch refers to who uses it, so all memory goes with the last name."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._idle: list[tuple[Batch, Draft | None]] = []  # oldest first
        self._statistics: dict[tuple[int, int | None], WindowStatistics] = {}
        self._lock = threading.Lock()

    def take(self, capacity: int, draft: Model | None, widths: Sequence[int]) -> tuple[Batch, Draft | None]:
        """A batch of at least so many slots, all free, and a draft of that model."""
        n = bucket(capacity)
        with self._lock:
            for found in reversed(self._idle):
                if found[0].n == n and (None if found[1] is None else found[1].batch.model) is draft:
                    self._idle.remove(found)
                    return found
        self.make_room(
            batch_bytes(self._model, n, False, widths) + (0 if draft is None else batch_bytes(draft, n, False, (1,)))
        )
        with launching(self._model.device):
            batch = Batch(self._model, n)
            return batch, None if draft is None else Draft(draft, batch)

    def make_room(self, needed: float) -> None:
        """Gives the memory of idle batches back, oldest first, until so many bytes are free."""
        with self._lock:
            while self._idle and needed > MEMORY_SHARE * free_memory(self._model.device):
                self._idle.pop(0)

    def give_back(self, batch: Batch, draft: Draft | None) -> None:
        """A batch with all slots free, and nothing under way."""
        with self._lock:
            self._idle.append((batch, draft))
            del self._idle[:-_IDLE]

    def statistics(self, n: int, draft: Model | None) -> WindowStatistics:
        """What sessions of so many slots found out."""
        with self._lock:
            return self._statistics.setdefault((n, None if draft is None else id(draft)), WindowStatistics())

    def idle_bytes(self, widths: Sequence[int]) -> float:
        with self._lock:
            return sum(batch_bytes(batch.model, batch.n, batch.guided, widths) for batch, _ in self._idle)
