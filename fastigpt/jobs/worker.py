"""What every executor runs: claim a shard that nobody has drawn, draw it, commit it, until there is none left."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np

from fastigpt.jobs.claims import Claims
from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.records import Drawer, Record
from fastigpt.owner import this_process

Draw = Callable[[range], np.ndarray]
"""Image indices to their tokens, uint16 [m, H·W]."""


class Worker:
    """drawer: called after a shard, for its record. part: (i, N), i from 1: only every N-th shard. held: a block that
    no signal ends."""

    def __init__(
        self,
        job: JobDirectory,
        draw: Draw,
        drawer: Callable[[], Drawer],
        *,
        part: tuple[int, int] | None = None,
        claims: Claims | None = None,
        held: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        owner = this_process()
        self._job, self._draw, self._drawer, self._held = job, draw, drawer, held
        self._claims = Claims(job.store, owner) if claims is None else claims
        first, step = (0, 1) if part is None else (part[0] - 1, part[1])
        shards = list(range(first, job.parameters.n_shards, step))
        # Workers begin at different places, so that they seldom want the same shard.
        start = zlib.crc32(owner.tag.encode()) % max(1, len(shards))
        self._shards = shards[start:] + shards[:start]

    def step(self) -> Record | Literal["wait", "done"]:
        """Draws a shard; its record as it stands. "wait": all that are missing are being drawn by others. "done": none
        is missing."""
        committed = self._job.committed()
        self._shards = [shard for shard in self._shards if shard not in committed]
        if not self._shards:
            return "done"
        shard = self._claims.take(self._shards)
        if shard is None:
            return "wait"
        with self._claims.held(shard):
            if shard in self._job.committed():  # between the look and the claim
                return self._job.record(shard)
            started = time.perf_counter()
            tokens = self._draw(self._job.parameters.images(shard))
            with self._held():
                return self._job.commit(shard, tokens, self._drawer(), time.perf_counter() - started)

    def run(self) -> None:
        """Until no shard is missing."""
        while (found := self.step()) != "done":
            if found == "wait":
                time.sleep(self._job.store.poll)
