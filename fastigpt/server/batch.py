"""The running batch: everybody's canvases, drawn side by side by one thread for each model.

At every row boundary canvases that are finished or given up leave, and waiting ones take their slots, requests in turns
(waiting.py). What is drawn into a canvas depends on its request alone: it gets the tokens that `model.sample` or
`model.complete` would draw with the same seed and index, whoever else is there. For those who serve requests:

    batch = Batch(model)
    batch.start()                                    # blocks: opens a session and tries it
    ticket = batch.submit(requests, rows=True)       # on an event loop; `model.requests` makes requests
    async for event in ticket.events():              # see ticket.py
        match event:
            case Rows(image, first_row, tokens): ...     # int64 [rows, columns], only with rows=True
            case Done(image, tokens, passes): ...        # int64 [n_positions]
            case Failed(error): ...                      # TimeLimit, or what the engine raised
    ticket.cancel()                                  # at any time: its slots are free at the next row
    batch.drain()                                    # takes no more, finishes what it has, returns when all is done

`submit` raises QueueFull or Draining. An exception in a session fails the requests that are in it; the others go on in
a new one.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from fastigpt.engine import Advance, Session
from fastigpt.errors import CheckpointError
from fastigpt.job import Filled
from fastigpt.job import Request as Canvas
from fastigpt.model import Model
from fastigpt.server.ticket import Done, Event, Failed, Rows, Ticket, TimeLimit
from fastigpt.server.waiting import Waiting

LOG = logging.getLogger("fastigpt.server")

MOST_SLOTS = 64  # with more, everybody's rows come later and few pictures come sooner
SHORTEST_STEP, LONGEST_STEP = 0.005, 0.05  # seconds between two row boundaries
LONGEST_RETRY = 60  # seconds
_MEMORY = 0.8  # weight of the past in averages


class QueueFull(Exception):
    """retry_after: seconds after which there should be room, a whole number of at least 1."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Draining(Exception):
    """The batch takes no more requests."""


@dataclass
class Counts:
    """What a batch has done since it was made. rows: that became final, of abandoned canvases as well. passes: of the
    finished images. cancelled: images that were given up by whoever asked for them. failures: of sessions."""

    images: int = 0
    rows: int = 0
    passes: int = 0
    cancelled: int = 0
    failures: int = 0


@dataclass
class _Drawn:
    """The canvas in a slot. rows: that are final. told: that the ticket knows of."""

    ticket: Ticket
    image: int
    rows: int = 0
    told: int = 0


Told = list[tuple[Ticket, Event]]


class Batch:
    """capacity: slots; None: what fits the free memory, at most 64. max_queue: canvases that may wait for a slot.
    timeout: seconds that a request may take, waiting included. clock: time.monotonic, or a test's.

    Any thread may call its methods. Raises ValueError for numbers that no batch can have.
    """

    def __init__(
        self,
        model: Model,
        *,
        capacity: int | None = None,
        max_queue: int = 256,
        timeout: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.max_queue, self.timeout, self._clock = model, max_queue, timeout, clock
        if capacity is None:
            capacity = min(MOST_SLOTS, model.engine.room(guided=model.engine.spec.n_prefix_tokens > 1))
        if capacity < 1 or max_queue < 0 or not timeout > 0:
            raise ValueError(
                "a batch needs at least 1 slot, a queue of at least 0 canvases and a time limit above 0 seconds, not "
                f"{capacity}, {max_queue} and {timeout}"
            )
        self.capacity, self.counts = capacity, Counts()
        self._columns, self._height = model.engine.spec.columns, model.engine.spec.height
        self._changed = threading.Condition()  # guards the next five; what follows them is the thread's alone
        self._waiting: Waiting[Ticket] = Waiting()
        self._given_up: list[Ticket] = []
        self._running = 0
        self._draining = False
        self._image_seconds = 0.0  # between two images that are finished
        self._slots: dict[int, _Drawn] = {}
        self._session: Session | None = None
        self._row_seconds = LONGEST_STEP
        self._since_image = 0.0  # seconds of drawing
        self._thread = threading.Thread(target=self._run, name=f"fastigpt.batch {model.name}", daemon=True)

    # --- for everybody -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Opens a session, runs a pass in it, and starts the thread. Raises what the engine raises."""
        empty = torch.full((1, self._height * self._columns), -1, dtype=torch.int64, device="cpu")
        self._session = self.model.engine.open(self.capacity)
        (slot,) = self._session.add(self.model.requests(empty, seed=0))
        self._session.step(0.0)
        self._session.remove(slot)
        self._thread.start()

    def now(self) -> float:
        """Seconds of the clock that tickets go by."""
        return self._clock()

    @property
    def running(self) -> int:
        """Canvases in slots."""
        return self._running

    @property
    def waiting(self) -> int:
        """Canvases that wait for a slot."""
        with self._changed:
            return len(self._waiting)

    @property
    def open(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._draining

    def submit(self, requests: Sequence[Canvas], *, rows: bool = False) -> Ticket:
        """Puts canvases into the queue. Called on the event loop that reads the ticket.

        requests: at least one, of this batch's model and without `stop`; they begin with the same known tokens, as
        those of one `Model.requests` for n images do. rows: whether its events tell of rows. Raises QueueFull and
        Draining.
        """
        now = self._clock()
        ticket = Ticket(requests, wants_rows=rows, submitted=now, deadline=now + self.timeout, give_up=self._give_up)
        with self._changed:
            if not self.open:
                raise Draining
            too_many = self._running + len(self._waiting) + len(requests) - self.capacity - self.max_queue
            if too_many > 0:
                raise QueueFull(min(LONGEST_RETRY, max(1, math.ceil(too_many * self._image_seconds))))
            self._waiting.add(ticket, len(requests))
            self._changed.notify()
        return ticket

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests, finishes those it has, ends. Whether that was done after so many seconds."""
        with self._changed:
            self._draining = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _give_up(self, ticket: Ticket) -> None:
        with self._changed:
            self._given_up.append(ticket)
            self._changed.notify()

    # --- the thread: nobody else touches the session -------------------------------------------------------------

    def _run(self) -> None:
        told: Told = []
        while (entering := self._boundary(told)) is not None:
            try:
                self._add(entering)
                if self._slots:
                    self._advance(told)
            except Exception as error:  # whatever an engine raises, the server goes on
                self._fail(error, entering, told)
            _tell(told)
            told = []
        if self._session is not None:
            self._session.close()

    def _boundary(self, told: Told) -> list[tuple[Ticket, int]] | None:
        """Lets go of what nobody waits for any more and says which canvases come in next. Waits while there is nothing
        to do; None: there will never be anything."""
        with self._changed:
            while not (self._slots or self._given_up or len(self._waiting)):
                if self._draining:
                    return None
                self._changed.wait()
            given_up, self._given_up = self._given_up, []
            for ticket in given_up:
                if not ticket.over:
                    self.counts.cancelled += ticket.unfinished
                    self._drop(ticket)
            now = self._clock()
            for ticket in dict.fromkeys([*(drawn.ticket for drawn in self._slots.values()), *self._waiting.owners()]):
                if now >= ticket.deadline:
                    self._drop(ticket)
                    told.append((ticket, Failed(TimeLimit(f"took longer than {self.timeout:g} s"))))
            # What they read before they draw keeps everybody waiting: about a canvas of that at a time.
            entering = self._waiting.take(
                self.capacity - len(self._slots), lambda ticket: ticket.prefill, self._height * self._columns
            )
            for ticket, _ in entering:
                ticket.started = now if ticket.started is None else ticket.started
            self._running += len(entering)
        return entering

    def _add(self, entering: Sequence[tuple[Ticket, int]]) -> None:
        if not entering:
            return
        if self._session is None:
            self._session = self.model.engine.open(self.capacity)
        slots = self._session.add([ticket.requests[image] for ticket, image in entering])
        self._slots.update((slot, _Drawn(*canvas)) for slot, canvas in zip(slots, entering))

    def _advance(self, told: Told) -> None:
        """Draws for about half a row's time, so that whoever comes now has their first row within two."""
        session = self._session
        assert session is not None
        started = self._clock()
        moved = session.step(min(LONGEST_STEP, max(SHORTEST_STEP, self._row_seconds / 2)))
        self._measure(moved, started, self._clock())
        done = [advance.slot for advance in moved if advance.decided >= self._height * self._columns]
        rows = [slot for slot, drawn in self._slots.items() if drawn.ticket.wants_rows and drawn.rows > drawn.told]
        wanted = list(dict.fromkeys([*rows, *done]))
        if not wanted:
            return
        read = session.read(wanted)
        found = {slot: read.canvas(i) for i, slot in enumerate(wanted)}
        for slot in rows:
            drawn = self._slots[slot]
            lines = found[slot].tokens.view(self._height, self._columns)[drawn.told : drawn.rows]
            told.append((drawn.ticket, Rows(drawn.image, drawn.told, lines.clone())))
            drawn.told = drawn.rows
        ends = [(self._slots[slot].ticket, self._end(self._slots[slot], found[slot])) for slot in done]
        with self._changed:
            if done:
                seconds, self._since_image = self._since_image / len(done), 0.0
                self._image_seconds += (1 - _MEMORY) * (seconds - self._image_seconds)
            for slot in done:
                self._free(slot)
            for ticket, event in ends:
                self._finish(ticket, event, told)

    def _measure(self, moved: Sequence[Advance], started: float, now: float) -> None:
        """How long a row takes, and how many there were."""
        more, seconds = 0, now - started
        for advance in moved:
            drawn = self._slots[advance.slot]
            more += advance.decided // self._columns - drawn.rows
            drawn.rows = advance.decided // self._columns
            ticket = drawn.ticket
            if ticket.first_row is None and drawn.rows > ticket.known // self._columns:
                ticket.first_row = now
        self.counts.rows += more
        self._since_image += seconds
        if more:
            self._row_seconds += (1 - _MEMORY) * (seconds * len(moved) / more - self._row_seconds)

    def _end(self, drawn: _Drawn, filled: Filled) -> Done | Failed:
        try:
            self.model.check_drawn([drawn.ticket.requests[drawn.image]], filled)
        except CheckpointError as error:  # what was drawn cannot be relied on; the session can
            return Failed(error)
        return Done(drawn.image, filled.tokens[0].clone(), int(filled.pass_starts.sum()))

    def _finish(self, ticket: Ticket, event: Done | Failed, told: Told) -> None:
        if ticket.over:
            return
        told.append((ticket, event))
        if isinstance(event, Failed):
            LOG.error("a drawing failed", extra={"error": str(event.error)})
            self._drop(ticket)
            return
        self.counts.images += 1
        self.counts.passes += event.passes
        ticket.unfinished -= 1
        ticket.over = ticket.unfinished == 0

    def _drop(self, ticket: Ticket) -> None:
        """The ticket's canvases leave the queue and their slots."""
        ticket.over = True
        self._waiting.drop(ticket)
        for slot in [slot for slot, drawn in self._slots.items() if drawn.ticket is ticket]:
            self._free(slot)

    def _free(self, slot: int) -> None:
        assert self._session is not None
        self._session.remove(slot)
        del self._slots[slot]
        self._running -= 1

    def _fail(self, error: Exception, entering: Sequence[tuple[Ticket, int]], told: Told) -> None:
        """Gives up the session and every request with a canvas in it."""
        LOG.error("a session failed", exc_info=error)
        with self._changed:
            there = [*(drawn.ticket for drawn in self._slots.values()), *(ticket for ticket, _ in entering)]
            self._slots.clear()
            self._running = 0
            self.counts.failures += 1
            for ticket in dict.fromkeys(there):
                if not ticket.over:
                    ticket.over = True
                    self._waiting.drop(ticket)
                    told.append((ticket, Failed(error)))
        session, self._session = self._session, None
        if session is not None:
            with suppress(Exception):  # it has told what is wrong with it
                session.close()


def _tell(told: Told) -> None:
    """Hands events to their event loops, one call for each loop."""
    by_loop: dict[AbstractEventLoop, Told] = {}
    for ticket, event in told:
        by_loop.setdefault(ticket.loop, []).append((ticket, event))
    for loop, some in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed: nobody is there any more
            loop.call_soon_threadsafe(_deliver, some)


def _deliver(some: Told) -> None:
    for ticket, event in some:
        ticket.deliver(event)
