"""Ctrl-C and SIGTERM end a job where it is, never in the middle of a write."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """A signal that ends the job where it is. number: the signal's."""

    def __init__(self, number: int) -> None:
        self.number = number


class Signals:
    """Turns SIGINT and SIGTERM into Interrupted, except where they are held until a block is through."""

    def __init__(self) -> None:
        self._holding, self._waiting = False, 0

    def handle(self, number: int, frame: object) -> None:
        if self._holding:
            self._waiting = number
        else:
            raise Interrupted(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._waiting:
            raise Interrupted(self._waiting)


@contextmanager
def stoppable() -> Iterator[Signals]:
    """A block that SIGINT and SIGTERM end with Interrupted; what they did before is put back behind it."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():  # only there can they be handled
        yield signals
        return
    before = {number: signal.signal(number, signals.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
