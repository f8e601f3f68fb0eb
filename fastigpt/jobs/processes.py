"""Local workers: processes of their own, started anew (not forked), with the machine's cores dealt out among them.

A worker reads what to do from the first line of its standard input, and ends when that is closed, so also when its
driver is killed. It imports what its driver would, but not the main module: a script that calls `run` needs no guard.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import IO, Any

from fastigpt.jobs.asked import Asked, How, as_plain, from_plain
from fastigpt.jobs.store import Store, open_store

_TOLD = 3  # exit status of a worker that has told its error
_DEATHS = 3  # of workers, without a shard committed in between, before the run gives up
_START = "from fastigpt.jobs.processes import main; main()"
_LOOK, _PATIENCE = 0.1, 30.0  # seconds between looks at the workers, and until one that was told to end is killed


def run_processes(store: Store, asked: Asked, how: How) -> None:
    """Draws with how.workers processes until no shard is missing. A worker that dies is replaced; raises OSError if
    they die one after another, and what a worker raised if one fails."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = how.threads or max(1, cores // how.workers)
    order = json.dumps({"store": store.address, **as_plain(asked, replace(how, threads=threads))})
    workers = [_Process(order, threads) for _ in range(how.workers)]
    deaths, committed = 0, -1
    try:
        while workers:
            time.sleep(_LOOK)
            for worker in [worker for worker in workers if worker.ended()]:
                workers.remove(worker)
                if worker.status == 0:
                    continue
                if worker.status == _TOLD:
                    raise worker.error()
                now = sum(name.endswith(".json") for name in store.names("shards"))
                deaths, committed = (deaths + 1 if now == committed else 1), now
                print(f"worker {worker.pid} {worker.fate()}: another takes its place", file=sys.stderr)
                if deaths >= _DEATHS:
                    raise OSError(
                        f"{_DEATHS} workers died one after another, the last {worker.fate()}; if memory ran out, "
                        "fewer workers or a smaller batch size need less"
                    )
                workers.append(_Process(order, threads))
    finally:
        for worker in workers:
            worker.tell_to_end()
        until = time.monotonic() + _PATIENCE
        for worker in workers:
            worker.wait(until)


class _Process:
    def __init__(self, order: str, threads: int) -> None:
        few = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {sys.path!r}; {_START}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **few},
        )
        self.pid = self._process.pid
        self._told = ""
        threading.Thread(target=self._read, daemon=True).start()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead already: `ended` will tell
            self._process.stdin.write(order + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self._told = self._process.stdout.read()

    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def status(self) -> int | None:
        return self._process.returncode

    def fate(self) -> str:
        status = self._process.returncode
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    def error(self) -> Exception:
        """What the worker raised; of the exceptions that users see, the same kind."""
        told = json.loads(self._told.strip().splitlines()[-1])
        kinds: dict[str, type[Exception]] = {
            kind.__name__: kind for kind in (ValueError, TypeError, ImportError, OSError, MemoryError)
        }
        kinds |= {kind.__name__: kind for kind in (FileNotFoundError, FileExistsError, PermissionError)}
        return kinds.get(told["kind"], RuntimeError)(told["message"])

    def tell_to_end(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait(self, until: float) -> None:
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """A worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the driver decides
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    line = sys.stdin.readline()
    if not line:
        sys.exit(1)
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    from fastigpt.signals import Interrupted, stoppable

    try:
        with stoppable() as signals:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _work(json.loads(line), signals.held)
    except Interrupted as stop:
        os._exit(128 + stop.number)
    except Exception as error:
        if not isinstance(error, (ValueError, TypeError, ImportError, OSError, MemoryError)):
            import traceback

            traceback.print_exc()
        kinds = ("FileNotFoundError", "FileExistsError", "PermissionError", "TypeError", "ImportError", "MemoryError")
        kind = next((name for name in kinds if type(error).__name__ == name), None)
        kind = kind or next((k.__name__ for k in (ValueError, OSError) if isinstance(error, k)), "RuntimeError")
        answers.write(json.dumps({"kind": kind, "message": str(error) or type(error).__name__}) + "\n")
        answers.flush()
        os._exit(_TOLD)


def _end_with(stream: IO[str]) -> None:
    """Ends this process, between two writes, when its driver closes the stream or is gone."""
    while stream.readline():
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _work(order: dict[str, Any], held: Any) -> None:
    asked, how = from_plain(order)
    import torch

    assert how.threads is not None
    torch.set_num_threads(how.threads)

    from fastigpt.jobs.drawing import drawer_of, draws, open_job
    from fastigpt.jobs.worker import Worker

    job, model = open_job(open_store(order["store"]), asked, how)
    Worker(job, draws(job, model, how), drawer_of(model), part=how.part, held=held).run()
