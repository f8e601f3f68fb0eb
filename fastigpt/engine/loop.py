"""The one driver of sessions: canvases wait, take the slots that are free, are drawn side by side, and leave.

A slot that falls free takes the next waiting canvas at once, so that no slot idles while there is work. Whatever ends
the loop, an error in a callback or Ctrl-C included, closes its session and leaves the engine usable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch

from fastigpt.engine import Engine, Session, Window
from fastigpt.job import Filled, Request

SLICE = 0.05  # seconds of drawing between two looks at signals, finished rows and waiting canvases

OnRow = Callable[[range, int, torch.Tensor], None]
"""on_row(images, row, tokens): canvas row `row` of these images of the job is final; tokens int64 [len(images),
columns]."""


def run(
    engine: Engine,
    requests: Sequence[Request],
    *,
    batch_size: int | None = None,
    window: Window = "auto",
    draft: Engine | None = None,
    on_row: OnRow | None = None,
    on_done: Callable[[int], None] | None = None,
) -> tuple[Filled, int]:
    """Draws canvases; returns them in the order of the requests, and how many were drawn side by side at most.

    batch_size: slots; None: what fits the memory that is free and is of use. on_row is called once for every row of
    every canvas, for neighbours that started together; on_done with the number of canvases that have just been
    finished.
    """
    capacity = slots_for(engine, requests, batch_size=batch_size, window=window, draft=draft)
    with closing(engine.open(capacity, window=window, draft=draft)) as session:
        canvases = _Canvases(engine, session, requests, on_row)
        drive(session, canvases, len(requests), capacity, on_done)
    return canvases.found, capacity


class Work(Protocol):
    """What `drive` draws: images of a job, each in as many slots as it likes."""

    def start(self, images: list[int]) -> None:
        """Puts these images into free slots."""
        ...

    def advance(self, decided: dict[int, int]) -> int:
        """After a step: frees the slots of images that are finished, and returns how many those were. decided: of every
        slot, how many tokens are."""
        ...


def drive(session: Session, work: Work, count: int, at_once: int, on_done: Callable[[int], None] | None = None) -> None:
    """Draws images 0 … count − 1, `at_once` side by side: one that is finished makes room for the next."""
    waiting, running = iter(range(count)), 0
    while True:
        started = list(islice(waiting, at_once - running))
        if started:
            work.start(started)
            running += len(started)
        if not running:
            return
        done = work.advance({advance.slot: advance.decided for advance in session.step(SLICE)})
        running -= done
        if done and on_done is not None:
            on_done(done)


class _Canvases:
    """A canvas in a slot for each request."""

    def __init__(self, engine: Engine, session: Session, requests: Sequence[Request], on_row: OnRow | None) -> None:
        self.session, self.requests, self.n_positions = session, requests, engine.spec.n_positions
        self.found = empty(len(requests), engine)
        self.rows = None if on_row is None else _Rows(engine, on_row, self.found)
        self.image_of: dict[int, int] = {}
        self.end_of: dict[int, int] = {}

    def start(self, images: list[int]) -> None:
        requests = [self.requests[image] for image in images]
        slots = self.session.add(requests)
        self.image_of.update(zip(slots, images))
        ends = (self.n_positions if request.stop is None else request.stop for request in requests)
        self.end_of.update(zip(slots, ends))
        if self.rows is not None:
            self.rows.start(slots, images)

    def advance(self, decided: dict[int, int]) -> int:
        done = [slot for slot, position in decided.items() if position >= self.end_of[slot]]
        finished = [self.image_of[slot] for slot in done]
        if done:
            keep(self.session.read(done), self.found, finished)
        if self.rows is not None:
            self.rows.advance(self.session, decided, finished)
        for slot in done:
            self.session.remove(slot)
            del self.image_of[slot], self.end_of[slot]
        return len(done)


def empty(n: int, engine: Engine) -> Filled:
    """Room for n canvases: results go to their places at once, as thousands of small tensors would wake Python's
    garbage collector, which then walks through all of PyTorch."""
    shape = (n, engine.spec.n_positions)
    return Filled(
        torch.full(shape, -1, dtype=torch.int64, device="cpu"),
        torch.zeros(shape, dtype=torch.bool, device="cpu"),
        torch.zeros(n, dtype=torch.float64, device="cpu"),
    )


def keep(canvases: Filled, found: Filled, images: list[int]) -> None:
    """Puts finished canvases, one for each of `images`, into their places in `found`."""
    at = torch.tensor(images, device="cpu")
    found.tokens[at], found.pass_starts[at] = canvases.tokens.cpu(), canvases.pass_starts.cpu()
    found.log_likelihood[at] = canvases.log_likelihood.cpu()


def slots_for(
    engine: Engine,
    requests: Sequence[Request],
    *,
    batch_size: int | None,
    window: Window = "auto",
    draft: Engine | None = None,
    of_each: int = 1,
) -> int:
    """Slots of a session for these canvases, `of_each` for each of them: no more than they need, and at least as many
    as one needs."""
    if batch_size is None:
        guided = any(request.negative is not None for request in requests)
        batch_size = useful_slots(engine, guided=guided, window=window, draft=draft)
    return max(of_each, min(len(requests) * of_each, batch_size // of_each * of_each))


def useful_slots(
    engine: Engine, *, guided: bool, window: Window = "auto", draft: Engine | None = None, sessions: int = 1
) -> int:
    """Slots of each of so many sessions at a time: what fits the memory that is free, but none beyond those that make
    drawing faster."""
    room = engine.room(guided=guided, window=window, draft=draft) // sessions
    return min(room, engine.enough(guided=guided) or room)


@dataclass
class _Group:
    """Neighbouring images that started together: their rows are reported together."""

    images: range
    slot_of: dict[int, int]  # of the images that are still being drawn
    reported: int = 0


class _Rows:
    """Hands out rows in order, each once. found: where finished canvases are kept."""

    def __init__(self, engine: Engine, on_row: OnRow, found: Filled) -> None:
        self.height, self.columns, self.on_row, self.found = engine.spec.height, engine.spec.columns, on_row, found
        self.groups: list[_Group] = []

    def start(self, slots: list[int], images: list[int]) -> None:
        self.groups.append(_Group(range(images[0], images[-1] + 1), dict(zip(images, slots))))

    def advance(self, session: Session, decided: dict[int, int], finished: list[int]) -> None:
        """finished: images that are kept in `found` since the last call."""
        for group in self.groups:
            for image in finished:
                group.slot_of.pop(image, None)
            least = min((decided[slot] // self.columns for slot in group.slot_of.values()), default=self.height)
            if least > group.reported:
                self._report(session, group, least)
        self.groups = [group for group in self.groups if group.reported < self.height]

    def _report(self, session: Session, group: _Group, until: int) -> None:
        tokens = self.found.tokens[group.images.start : group.images.stop].clone()
        if group.slot_of:
            at = torch.tensor(list(group.slot_of), device="cpu") - group.images.start
            tokens[at] = session.read(list(group.slot_of.values())).tokens.cpu()
        for row in range(group.reported, until):
            group.reported = row + 1
            self.on_row(group.images, row, tokens[:, row * self.columns : (row + 1) * self.columns].clone())
