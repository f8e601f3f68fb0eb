"""csrc/tests/test_decode.cpp on every instruction set, watched by sanitizers, and on arm64 under emulation."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fastigpt import _C

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_no_sanitizer_complains(tmp_path: Path) -> None:
    program = tmp_path / "test_decode"
    flags = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([ROOT / "csrc/tests/build.sh", "test_decode", program, *flags], check=True, timeout=300)
    ran = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.split() == [word for isa in _C.supported_isas() for word in (isa, "ok")]


ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(ARM_COMPILER) is None or shutil.which(ARM_EMULATOR) is None,
    reason=f"needs {ARM_COMPILER} and {ARM_EMULATOR}",
)
def test_arm64_keeps_the_promises_too(tmp_path: Path) -> None:
    program = tmp_path / "test_decode"
    build = [ROOT / "csrc/tests/build.sh", "test_decode", program, "-O2", "-static"]
    subprocess.run(build, check=True, timeout=300, env={**os.environ, "CXX": ARM_COMPILER})
    ran = subprocess.run([ARM_EMULATOR, program], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.split() == ["generic", "ok"]
