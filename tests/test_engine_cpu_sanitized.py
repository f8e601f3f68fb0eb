"""csrc/tests/test_decode.cpp under the address and undefined-behaviour sanitizers, on every instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fastigpt import _C

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_no_sanitizer_complains(tmp_path: Path) -> None:
    program = tmp_path / "test_decode"
    flags = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([ROOT / "csrc/tests/build.sh", "test_decode", program, *flags], check=True, timeout=300)
    ran = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.split() == [word for isa in _C.supported_isas() for word in (isa, "ok")]
