"""Hostile input by the hundred: seeded cases of one kind, run in a process of their own so that crashes and hangs show.

A kind of input is a function of a test file that takes a `Case`, makes something hostile with it and hands it over:

    def a_config(case: Case) -> None:
        text = case.say(json.dumps({"n_layer": case.choice([-1, 0, 10**9])}))
        fastigpt.ImageGPTConfig.from_json(text)

    def test_configs_are_read_or_refused():
        survive(a_config, cases=300)

A case passes if it returns or raises exactly ValueError, TypeError or CheckpointError, with a message. Whatever else it
raises, a crash, a hang, or more memory than MEMORY fails the test, which names the cases; one is run again by

    python tests/fuzz/harness.py FILE FUNCTION NUMBER

Files with kinds are imported in the child as well: what they import should be light (no conftest).
"""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import json
import os
import random
import reprlib
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

SECONDS = 120.0  # for one case; what takes so long on a busy machine hangs
MEMORY = 6 << 30  # bytes of data that a process may hold, where the system can limit it
_MOST_CRASHES = 5  # after each the rest is run in a new process

T = TypeVar("T")


class Case(random.Random):
    """Source of one case's choices; the same number of the same kind makes the same ones."""

    def __init__(self, kind: str, number: int) -> None:
        super().__init__(f"{kind} {number}")
        self.said: list[str] = []

    def say(self, value: T) -> T:
        """Returns the value, and shows it beside the number should the case fail."""
        self.said.append(_repr(value))
        return value


def survive(kind: Callable[[Case], object], *, cases: int, seconds: float = SECONDS) -> None:
    """Runs the cases of a kind, a function at the top of a file; fails with a list of those that did not pass."""
    failures: list[tuple[str, str]] = []
    first = crashes = 0
    while first < cases and crashes < _MOST_CRASHES:
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            command = [sys.executable, __file__, inspect.getfile(kind), kind.__name__, str(first)]
            command += ["--to", str(cases), "--log", str(log), "--seconds", str(seconds)]
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
            events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        failures += [(event["what"], event["details"]) for event in events if "what" in event]
        if run.returncode == 0:
            break
        crashes += 1
        last = max((event["case"] for event in events), default=None)
        assert last is not None, f"{kind.__name__}: no case was begun\n{run.stderr[-4000:]}"
        ended = signal.Signals(-run.returncode).name if run.returncode < 0 else f"exit status {run.returncode}"
        what = "hang" if "Timeout (" in run.stderr else f"crash, {ended}"
        failures.append((what, f"case {last}: {what}\n{run.stderr[-3000:]}"))
        first = last + 1
    assert not failures, _report(kind, cases, failures)


def _report(kind: Callable[[Case], object], cases: int, failures: list[tuple[str, str]]) -> str:
    """Each way of failing with how often it was seen and the first case that showed it."""
    counts = Counter(what for what, _ in failures)
    firsts = dict(reversed(failures))
    lines = [f"{len(failures)} of {cases} cases of {kind.__name__} did not pass:"]
    lines += [f"\n{counts[what]} × {what}\n{firsts[what]}" for what in counts]
    return "\n".join(lines)


class _Repr(reprlib.Repr):
    """Short forms. Of a tensor without its values: PyTorch crashes where it shows one without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.maxdict, self.maxlist, self.maxstring, self.maxlong, self.maxother = 20, 8, 120, 60, 120

    def repr_Tensor(self, x: Any, level: int) -> str:
        if str(x.layout) != "torch.strided" or x.is_nested:
            return f"<{'nested' if x.is_nested else x.layout} {x.dtype}>"
        lazy = ", negated" * x.is_neg() + ", conjugated" * x.is_conj() + ", with grad" * x.requires_grad
        return f"<{x.dtype} {list(x.shape)}, strides {list(x.stride())}, on {x.device}{lazy}>"

    repr_Parameter = repr_Tensor


_repr = _Repr().repr


def _run(kind: Callable[[Case], object], number: int) -> tuple[str, str] | None:
    """None if the case passed, else the way it failed and the details."""
    from fastigpt import CheckpointError

    case = Case(kind.__name__, number)
    try:
        kind(case)
        return None
    except Exception as error:
        if type(error) in (ValueError, TypeError, CheckpointError) and str(error).strip():
            return None
        frames = traceback.extract_tb(error.__traceback__)
        what = f"{type(error).__name__} at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {str(error)[:80]}"
        said = "".join(f"\n  {line}" for line in case.said)
        return what, f"case {number}:{said}\n" + "".join(traceback.format_exception(error, limit=-4))


def _child(file: str, name: str, first: int, to: int, log: str, seconds: float) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path[:0] = [str(Path(file).resolve().parent), str(Path(__file__).resolve().parents[1])]
    sys.modules["harness"] = sys.modules["__main__"]
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    try:
        import resource
    except ImportError:  # Windows has no such limits
        pass
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in range(first, to):
        os.write(descriptor, (json.dumps({"case": number}) + "\n").encode())
        faulthandler.dump_traceback_later(seconds, exit=True)
        failure = _run(getattr(module, name), number)
        faulthandler.cancel_dump_traceback_later()
        if failure:
            event = {"case": number, "what": failure[0], "details": failure[1]}
            os.write(descriptor, (json.dumps(event) + "\n").encode())


def _main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="Runs one case again, or all of a kind for its test.")
    parser.add_argument("file")
    parser.add_argument("function")
    parser.add_argument("number", type=int)
    parser.add_argument("--to", type=int)
    parser.add_argument("--log", default="/dev/stdout")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args()
    faulthandler.enable()
    to = options.number + 1 if options.to is None else options.to
    _child(options.file, options.function, options.number, to, options.log, options.seconds)


if __name__ == "__main__":
    _main()
