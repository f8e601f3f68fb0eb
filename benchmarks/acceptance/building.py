"""Makes what the other stages run: the extension, and compiled kernels on all cores."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.acceptance.dry import dry
from benchmarks.acceptance.results import Rows

ROOT = Path(__file__).resolve().parents[2]


def build(out: Path, rows: Rows) -> None:
    """The extension, and the package where Python finds it: installed, or failing that in place."""
    install = [sys.executable, "-m", "pip", "install", "-q", "-e", ".", "--no-build-isolation", "--no-deps"]
    install += ["--dry-run"] if dry() else []
    run = subprocess.run(install, cwd=ROOT, capture_output=True, text=True, check=False)
    rows.add(step="pip install -e .", ok=run.returncode == 0, output=(run.stdout + run.stderr)[-1500:])
    if run.returncode:
        site = Path(os.environ["ACCEPTANCE_SITE"])  # on the path of every later stage
        # setup.py beside no pyproject.toml: an old setuptools refuses that file, and the extension needs none of it.
        for link, target in (
            (site / "fastigpt", ROOT / "fastigpt"),
            (site / "csrc", ROOT / "csrc"),
            (site / "setup.py", ROOT / "setup.py"),
        ):
            if not link.exists():
                link.symlink_to(target)
        if importlib.util.find_spec("pybind11") is None:
            pybind11_of_torch(site / "pybind11")
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", "built"]
        run = subprocess.run(command, cwd=site, capture_output=True, text=True, check=False)
        rows.add(step="setup.py build_ext", ok=run.returncode == 0, output=(run.stdout + run.stderr)[-1500:])
        run.check_returncode()
        for library in () if dry() else (site / "built" / "fastigpt").iterdir():  # others may run what is there
            fresh = ROOT / "fastigpt" / f".{library.name}"
            shutil.copy(library, fresh)
            os.replace(fresh, ROOT / "fastigpt" / library.name)


def pybind11_of_torch(folder: Path) -> None:
    """As much of the package pybind11 as setup.py needs, around the headers that torch brings along."""
    import torch

    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text("")
    (folder / "setup_helpers.py").write_text(
        "from setuptools import Extension\n"
        "class Pybind11Extension(Extension):\n"
        "    def __init__(self, *args, cxx_std=17, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        f"        self.include_dirs.append({str(Path(torch.__file__).parent / 'include')!r})\n"
        "        self.extra_compile_args.append(f'-std=c++{cxx_std}')\n"
        "        self.language = 'c++'\n"
    )


def compile_on_all_cores(stage: str, out: Path, seconds: float) -> None:
    """Triton compiles for seconds per kernel and keeps the result on disk: processes that each launch a share of a
    stage's kernels leave the stage itself nothing to wait for. What they do not get done in `seconds` it compiles
    itself; a dry run, in which nothing is compiled, waits for one of them."""
    shares = 4 if dry() else max(1, min(14, (os.cpu_count() or 2) - 1))
    started = 1 if dry() else shares
    command = [sys.executable, "-m", "benchmarks.acceptance", "--out", str(out), "--compile", stage]
    begun = time.monotonic()
    processes = [subprocess.Popen([*command, "--share", str(i), str(shares)], cwd=ROOT) for i in range(started)]
    late = 0
    for process in processes:
        try:
            process.wait(timeout=None if dry() else max(0.1, begun + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late += 1
    codes = [process.returncode for process in processes]
    print(f"compiled in {time.monotonic() - begun:.1f} s; {late} stopped; exit codes {codes}", flush=True)
