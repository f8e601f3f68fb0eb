"""Runs the kernel tests of this folder in Triton's interpreter, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
FILES = sorted(p.name for p in FOLDER.glob("test_*.py") if p.name not in {"test_interpreter.py", "test_compile.py"})


@pytest.mark.parametrize("file", FILES)
def test_kernels_equal_their_twins_in_the_interpreter(file):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", file]
    run = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True, check=False)
    print(run.stdout[-5000:], run.stderr[-2000:])
    assert run.returncode == 0
    assert " passed" in run.stdout and "skipped" not in run.stdout
