"""A lock that a forked child finds free, whoever held it in the parent: that thread is not there to let go of it."""

from __future__ import annotations

import os
import threading
import weakref

_made: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """A reentrant lock for `with` statements. What it guards must be whole whenever other threads may run, or be made
    anew in a child."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _made.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()  # a copy of what it guards has a lock of its own

    def _in_child(self) -> None:
        if self._lock.acquire(blocking=False):  # free, or of the thread that forked
            self._lock.release()
        else:
            self._lock = threading.RLock()


def _in_child() -> None:
    for lock in list(_made):
        lock._in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
