"""A model and all operators work after fork(), in a child that then ends as processes do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastigpt.locks import Lock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork()")


def test_a_model_and_all_operators_survive_a_fork() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).parent / "forking.py"],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    assert ran.stdout.count("ok ") == 11


def test_a_lock_that_another_thread_holds_is_free_in_the_child() -> None:
    lock, held, enough = Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            enough.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        os._exit(0 if lock._lock.acquire(timeout=60) else 1)
    enough.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_lock_that_the_forking_thread_holds_stays_its_own() -> None:
    lock = Lock()
    with lock:
        pid = os.fork()
        if pid == 0:
            signal.alarm(120)
            with lock:  # reentrant
                pass
    if pid == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
