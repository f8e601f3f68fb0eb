"""The fuzz tests' own test: what they must find is found, and what is allowed is allowed."""

import os
import signal
import time

import pytest
from harness import Case, survive

from fastigpt import CheckpointError


def promised(case: Case) -> None:
    raise case.choice([ValueError, TypeError, CheckpointError])("n must be 1")


def mixed(case: Case) -> None:
    case.say({"n": case.randrange(3)})
    if case.random() < 0.2:
        raise KeyError("n")
    if case.random() < 0.2:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a subclass that nobody promised")
    if case.random() < 0.2:
        raise ValueError  # says nothing


def crash(case: Case) -> None:
    if case.random() < 0.3:
        os.kill(os.getpid(), signal.SIGSEGV)
    raise ValueError("n must be 1")


def hang(case: Case) -> None:
    if case.random() < 0.5:
        time.sleep(1000)


def test_promised_exceptions_pass():
    survive(promised, cases=20)


def test_other_exceptions_fail_and_are_counted():
    with pytest.raises(AssertionError) as caught:
        survive(mixed, cases=40)
    text = str(caught.value)
    assert "KeyError at test_harness.py" in text and "UnicodeDecodeError" in text and "ValueError at" in text
    assert "{'n': " in text and " × KeyError" in text
    numbers = [k for k in range(40) if fails(Case("mixed", k))]
    assert f"{len(numbers)} of 40 cases of mixed" in text and f"case {numbers[0]}:" in text


def fails(case: Case) -> bool:
    case.randrange(3)
    return case.random() < 0.2 or case.random() < 0.2 or case.random() < 0.2


def test_crashes_fail_and_the_rest_still_runs():
    with pytest.raises(AssertionError) as caught:
        survive(crash, cases=4)
    numbers = [k for k in range(4) if Case("crash", k).random() < 0.3]
    assert f"{len(numbers)} of 4 cases" in str(caught.value) and "crash, SIGSEGV" in str(caught.value)
    assert f"case {numbers[0]}: crash" in str(caught.value)


def test_hangs_fail():
    with pytest.raises(AssertionError, match=r"case .*: hang"):
        survive(hang, cases=2, seconds=1)
