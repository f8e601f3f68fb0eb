"""Rows of a job as an iterator: the job runs in a thread of its own, a bounded distance ahead of its reader."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator

import torch

from fastigpt.engine import OnRow

AHEAD = 32  # finished rows that wait for the reader before the work pauses

Row = tuple[range, int, torch.Tensor]
"""images, row, tokens: canvas row `row` of these images of the job; tokens int64 [len(images), width]."""


class RowStream(Iterator[Row]):
    """Iterates over the rows of a job as they are finished; `seed` is the seed it draws with.

    The work starts at once and pauses while 32 rows wait. `close()`, leaving a `with` block, or dropping the iterator
    stops it at the row it is at and waits for that; any thread may call `close()`. An error in the work is raised by
    `next()`. One thread reads a stream; a model may have many streams at once. A forked child has no part in the
    streams of its parent: `next()` raises RuntimeError there.
    """

    def __init__(self, work: Callable[[OnRow], object], seed: int) -> None:
        self.seed = seed
        self._rows: queue.SimpleQueue[Row | BaseException | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(AHEAD)
        stop = threading.Event()
        # Nothing that the thread holds refers to this object, so that dropping it is noticed.
        thread = threading.Thread(
            target=_run, args=(work, self._rows, self._room, stop), name="fastigpt.stream", daemon=True
        )
        self._process = os.getpid()
        self._end = weakref.finalize(self, _stop, stop, self._room, thread, self._process)
        thread.start()

    def __next__(self) -> Row:
        if not self._end.alive:
            raise StopIteration
        if os.getpid() != self._process:
            raise RuntimeError("this stream's work is done in the process that began it, not in a forked child")
        found = self._rows.get()
        if isinstance(found, tuple):
            self._room.release()
            return found
        self._end()
        if found is not None:
            raise found
        raise StopIteration

    def close(self) -> None:
        """Stops the work at the row it is at and returns when it has stopped; does nothing the second time."""
        self._end()

    def __enter__(self) -> RowStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Closed(Exception):
    """Ends the work from inside its row callback."""


def _run(
    work: Callable[[OnRow], object],
    rows: queue.SimpleQueue[Row | BaseException | None],
    room: threading.Semaphore,
    stop: threading.Event,
) -> None:
    def on_row(images: range, row: int, tokens: torch.Tensor) -> None:
        room.acquire()
        if stop.is_set():
            raise _Closed
        rows.put((images, row, tokens))

    try:
        work(on_row)
    except _Closed:
        rows.put(None)
    except BaseException as error:  # whatever it is, it is the reader's
        rows.put(error)
    else:
        rows.put(None)


def _stop(stop: threading.Event, room: threading.Semaphore, thread: threading.Thread, process: int) -> None:
    if os.getpid() != process:  # a forked child: the thread is not here, and it may have held these locks
        return
    stop.set()
    room.release()
    if thread is not threading.current_thread():  # the garbage collector may have run there
        thread.join()
