"""Processes that die by kill -9 at every moment between two changes of the disk."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

TOUCHES = ("fsync", "replace", "link", "unlink", "mkdir", "rename")


def die_at(count: int) -> None:
    """kill -9 for this process before or after one of the calls that change the disk: 2k before, 2k + 1 after."""
    seen = 0

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal seen
            for moment in range(2):
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
                if moment == 0:
                    result = call(*args, **options)
            return result

        return counted

    for name in TOUCHES:
        setattr(os, name, dying(getattr(os, name)))


def forked(work: Callable[[], object]) -> int:
    """Runs work in a forked child; its status: 0, 1 after an error, −9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
