"""What a request to the running batch gets back: events, in the order in which its canvases come along."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

import torch

from fastigpt.job import Request


@dataclass(frozen=True)
class Rows:
    """Canvas rows first_row … of an image are final. image: place in the requests that were submitted. tokens: int64
    [rows, columns]."""

    image: int
    first_row: int
    tokens: torch.Tensor


@dataclass(frozen=True)
class Done:
    """An image is finished. tokens: int64 [n_positions]. passes: of the model, that it took."""

    image: int
    tokens: torch.Tensor
    passes: int


@dataclass(frozen=True)
class Failed:
    """The whole request is given up. error: TimeLimit, or what the engine raised."""

    error: Exception


Event = Rows | Done | Failed


class TimeLimit(Exception):
    """A request took longer than the server lets any."""


class Ticket:
    """A request that was submitted; lives on the event loop that submitted it.

    requests: its canvases, which begin alike. wants_rows: whether there are Rows events. submitted, started, deadline:
    seconds of the batch's clock when it was submitted, when its first canvas got a slot (None: it waits), and when it
    is given up; first_row: when the first row that was drawn was final. known: tokens before the first that is drawn.
    prefill: tokens that are read before that. unfinished, over: the batch's.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        wants_rows: bool,
        submitted: float,
        deadline: float,
        give_up: Callable[[Ticket], None],
    ) -> None:
        self.requests, self.wants_rows = tuple(requests), wants_rows
        self.submitted, self.deadline = submitted, deadline
        self.started: float | None = None
        self.first_row: float | None = None
        first = requests[0]
        unknown = (first.tokens < 0).nonzero()
        self.known = int(unknown[0]) if len(unknown) else len(first.tokens)
        self.prefill = sum(len(prefix) + self.known for prefix in (first.prefix, first.negative) if prefix)
        self.unfinished, self.over = len(requests), False
        self._give_up = give_up
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    async def events(self) -> AsyncGenerator[Event]:
        """Everything that happens to the request, in order; ends after the last Done, after Failed, and when it is
        cancelled. An image's Rows come before its Done, without gaps, and hold every row, known ones included."""
        left = len(self.requests)
        while left and (event := await self._events.get()) is not None:
            yield event
            if isinstance(event, Failed):
                return
            left -= isinstance(event, Done)

    def cancel(self) -> None:
        """Gives the request up: its canvases leave the batch at the next row. Does nothing to a request that is
        over."""
        self._give_up(self)
        self._events.put_nowait(None)

    def deliver(self, event: Event) -> None:
        """For the batch, on the ticket's event loop."""
        self._events.put_nowait(event)
