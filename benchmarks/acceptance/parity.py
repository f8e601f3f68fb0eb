"""Every kernel beside its plain twin, and its memory accesses beside the sanitizer's."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.acceptance.building import ROOT
from benchmarks.acceptance.dry import dry
from benchmarks.acceptance.results import Rows

# Kernels' tests that say most in little time, for Triton's interpreter, where all of them take minutes.
INTERPRETED = "test_gpu_ops or fused_qkv or scratch or go_into_the_cache or weights_may"
# What the sanitizer sees: small tests, for it makes everything tens of times slower, and none that captures a graph,
# which the caching allocator is needed for.
CHECKED = (
    ("test_nearest_centroid_cuda.py", "equals_cpu and not 256 and not 1048576 and not 5000"),
    ("kernels/test_decode_attention.py", "one_token"),
    ("kernels/test_sample_head.py", "last_position or chunk"),
)
CHECKING = 38.0  # most seconds for each of them
_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")
_TEST = re.compile(r"([\w/.-]*test_\w+\.py)(::\S+)?")


def tests(out: Path, rows: Rows) -> None:
    """The tests that need a GPU, or some of the kernels' in Triton's interpreter: a row for each file as far as it is,
    and one for each test that fails. Compiling takes most of the time, so on as many processes as there are cores where
    pytest-xdist is."""
    from fastigpt.kernels import launch

    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(14, (os.cpu_count() or 2) - 1)))]
    if dry() or launch.interpreting():
        # As tests/kernels/test_interpreter.py starts them: from their own folder, without the suite's settings.
        command += ["-k", INTERPRETED, *sorted(map(str, gpu_files(ROOT / "tests" / "kernels")))]
    else:
        command += ["-m", "gpu", *sorted(map(str, gpu_files(ROOT / "tests")))]
    if dry():
        every = [sys.executable, "-m", "pytest", "-q", "--collect-only", *sorted(map(str, gpu_files(ROOT / "tests")))]
        rows.add(step="collect", ok=subprocess.run(every, cwd=ROOT, check=False).returncode == 0)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for found in tally(echoed(run.stdout)):
            rows.put(found)
    rows.add(work="pytest", returncode=run.returncode)
    if run.returncode:
        raise RuntimeError(f"pytest ended with {run.returncode}")


def gpu_files(folder: Path) -> Iterator[Path]:
    """Only the files that need a GPU are collected: others may import what a bare machine does not have."""
    wanted = re.compile(r"mark\.gpu|import .*pytestmark")
    return (file for file in folder.rglob("test_*.py") if wanted.search(file.read_text()))


def echoed(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        print(line, end="", flush=True)
        yield line


def tally(lines: Iterable[str]) -> Iterator[list[dict]]:
    """Rows of what pytest -v has said so far, whenever there is something new: a row for each file with how many of its
    tests ended how, then one for each that failed."""
    files: dict[str, dict[str, int]] = {}
    failed: dict[str, dict] = {}
    running = True
    for line in lines:
        outcome, test = _OUTCOME.search(line), _TEST.search(line)
        # What was printed by tests that failed, and a summary: only what could not be collected stands nowhere else.
        running = running and not re.match("=+ (ERRORS|FAILURES|.*summary)", line)
        if outcome is None or test is None or not (running or (line.startswith("ERROR ") and test[2] is None)):
            continue
        name = outcome[1].lower()
        counts = files.setdefault(test[1], {"passed": 0, "failed": 0, "error": 0, "skipped": 0})
        counts[name] += 1
        if name in ("failed", "error"):
            failed[test[0]] = {"work": test[0], "error": name}
        yield [{"work": file, **found} for file, found in files.items()] + list(failed.values())


def memcheck(out: Path, rows: Rows) -> None:
    """compute-sanitizer over the kernels of csrc, then over Triton's: out-of-bounds and misaligned accesses. Without
    torch's caching allocator, whose blocks are larger than the tensors in them and would hide both. A dry run has no
    sanitizer, and sees that the tests are there."""
    sanitizer = [] if dry() else ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    pytest += [] if dry() else ["-m", "gpu"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def checked(file: str, which: str) -> None:
        command = [*sanitizer, *pytest, str(ROOT / "tests" / file), "-k", which]
        try:
            run = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=CHECKING
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"stopped after {CHECKING:.0f} s") from None
        rows.add(work=file, returncode=run.returncode, output=(run.stdout + run.stderr)[-1500:])
        if run.returncode:
            rows.failed.append(f"{file}: {run.returncode}")

    for file, which in CHECKED:
        rows.attempt(file, partial(checked, file, which))
    rows.finish()
