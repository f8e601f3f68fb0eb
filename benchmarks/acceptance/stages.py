"""The stages in order, the figures asked for first, and how one is run: in a process of its own, with a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.acceptance import building, engines, kernels, parity, peers
from benchmarks.acceptance.building import ROOT
from benchmarks.acceptance.dry import dry
from benchmarks.acceptance.results import Rows

LIMIT = 575.0  # seconds for a run: with starting and reporting less than ten minutes
DRY_LIMIT = 3600.0  # of a dry run, and of each of its stages: the interpreter takes its time


@dataclass(frozen=True)
class Stage:
    """seconds: most it may take. compiled(share, shares): launches a share of its kernels. interpreted: whether it
    means something without a GPU, in Triton's interpreter."""

    run: Callable[[Path, Rows], None]
    seconds: float
    compiled: Callable[[int, int], None] | None = None
    interpreted: bool = False


STAGES = {
    "build": Stage(building.build, 130.0, interpreted=True),
    "machine": Stage(kernels.machine, 25.0, interpreted=True),
    "tests": Stage(parity.tests, 225.0, interpreted=True),
    "tune": Stage(kernels.tune, kernels.TUNING, kernels.compile_tune),
    "engine": Stage(engines.engine, 190.0, engines.compile_engine),
    "kernels": Stage(kernels.kernels, 85.0, kernels.compile_kernels),
    "quantise": Stage(kernels.quantise, 20.0),
    "memcheck": Stage(parity.memcheck, 3 * parity.CHECKING + 6),
    "peers": Stage(peers.peers, peers.SECONDS),
}
# Each on a machine of its own, on which nothing is built yet. What a run's stages may take together is less than LIMIT.
RUNS = {
    "first": ("build", "machine", "tests", "tune"),
    "second": ("build", "machine", "engine", "kernels", "quantise", "memcheck"),
    "peers": ("build", "machine", "peers"),
}


def environment(site: Path) -> dict[str, str]:
    """Of every stage: `site` is where "build" puts the package if it cannot be installed."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "ACCEPTANCE_SITE": str(site), "PYTHONUNBUFFERED": "1"}


def why_not() -> str | None:
    """Why nothing here could run, in a sentence; None if it can. Needs no extension."""
    import torch

    from fastigpt.kernels import launch

    if launch.interpreting() or dry():
        return launch.why_unavailable(torch.device("cpu"))
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU; "
            "with TRITON_INTERPRET=1 the stages run that need none"
        )
    return launch.why_unavailable(torch.device("cuda", 0))


def why_no_extension(site: Path) -> str | None:
    """What Python says to the extension, None if it imports."""
    run = subprocess.run(
        [sys.executable, "-c", "import fastigpt._C"],
        cwd=ROOT, env=environment(site), capture_output=True, text=True, check=False,
    )  # fmt: skip
    return None if run.returncode == 0 else (run.stderr.strip().splitlines() or ["it cannot be imported"])[-1]


def run_stage(stage: str, out: Path, site: Path, seconds: float) -> dict[str, object]:
    """Runs a stage and says how it went. What it prints goes to log.txt."""
    command = [sys.executable, "-m", "benchmarks.acceptance", "--out", str(out), "--stage", stage]
    begun = time.monotonic()
    with (out / "log.txt").open("ab") as log:
        log.write(f"\n=== {stage}\n".encode())
        log.flush()
        start = log.tell()
        # A session of its own, so that what it started ends with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(site), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = f"stopped after {seconds:.0f} s"
    result: dict[str, object] = {"stage": stage, "ok": code == 0, "seconds": time.monotonic() - begun}
    if code != 0:
        result["result"] = code
        result["log"] = (out / "log.txt").read_bytes()[start:].decode(errors="replace")[-2000:]
    return result
