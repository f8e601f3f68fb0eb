"""CUDA on the host (csrc/cuda/host): kernels that are right run, and each kind of mistake in them is found."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_host import CSRC, build, needs_compiler, run

KERNELS = CSRC / "tests" / "cuda_host_kernels.cu"
RACE, OUTSIDE, MISALIGNED = "data race", "use-after-poison", "misaligned address"
LEFT_UNDEFINED, WRONG = "CUDA on the host", ""  # wrong: nothing is said, the result differs

# Kernel and number of the bug, as in cuda_host_kernels.cu; who finds it and how.
BUGS = {
    "no cluster barrier before peers are read": ("products", 1, "races", RACE),
    "a block ends while its shared memory is read": ("products", 2, "races", RACE),
    "no block barrier before the one arrival": ("products", 3, "races", RACE),
    "relaxed arrival": ("products", 4, "races", RACE),
    "relaxed watch": ("products", 5, "races", RACE),
    "no grid barrier": ("products", 6, "races", RACE),
    "__ldg of what the launch writes": ("products", 7, "races", LEFT_UNDEFINED),
    "past dynamic shared memory": ("products", 8, "bounds", OUTSIDE),
    "uninitialised shared memory": ("products", 9, "bounds", WRONG),
    "a shuffle taken for a barrier": ("lanes", 1, "races", RACE),
    "a shuffle from outside its mask": ("lanes", 2, "bounds", WRONG),
    "a barrier in a branch": ("lanes", 3, "races", LEFT_UNDEFINED),
    "a sum that is not atomic": ("lanes", 4, "races", RACE),
    "a vector that is not aligned": ("vectors", 1, "bounds", MISALIGNED),
    "two blocks write the same places": ("vectors", 3, "races", RACE),
    "past a shared array": ("vectors", 2, "bounds", "out of bounds for type"),
}


def built_and_right(folder: Path, watch: str) -> Path:
    """The program under this watch, whose kernels without a bug run and are told nothing of."""
    program = build(folder / "kernels", watch, KERNELS)
    for kernel in ("products", "lanes", "vectors"):
        done = run(program, kernel)
        assert done.returncode == 0 and not done.stderr, done.stderr
    return program


@needs_compiler
def test_right_kernels_run_and_races_are_found(tmp_path: Path) -> None:
    program = built_and_right(tmp_path, "races")
    for name, (kernel, bug, watch, says) in BUGS.items():
        if watch == "races":
            done = run(program, kernel, bug)
            assert done.returncode and says in done.stderr, (name, done)


@pytest.mark.slow
@needs_compiler
def test_steps_outside_and_values_from_nowhere_are_found(tmp_path: Path) -> None:
    program = built_and_right(tmp_path, "bounds")
    for name, (kernel, bug, watch, says) in BUGS.items():
        if watch == "bounds":
            done = run(program, kernel, bug)
            assert done.returncode and says in done.stderr and bool(says) == bool(done.stderr), (name, done)
    done = run(program, "products", 9, FASTIGPT_CUDA_BORN="0")
    assert done.returncode == 0, "shared memory that is born zero hides what the default, NaN, shows"

    # Half and bfloat16, there and back, as PyTorch has them: every half, and values around each.
    bits = np.arange(1 << 16, dtype=np.uint16)
    halves, brains = (torch.from_numpy(bits.view(np.int16)).view(dtype) for dtype in (torch.float16, torch.bfloat16))
    exact = torch.cat([halves.float(), brains.float()])
    middles = (exact[1:].double() + exact[:-1].double()).div(2).float()
    values = torch.cat([exact, middles, exact.nextafter(middles[0]), middles.nextafter(exact[0])])
    (tmp_path / "in").write_bytes(values.numpy().tobytes())
    done = run(program, "convert", tmp_path / "in", tmp_path / "out")
    assert done.returncode == 0 and not done.stderr, done.stderr
    out, n = (tmp_path / "out").read_bytes(), len(values)
    for dtype, at in ((torch.float16, 0), (torch.bfloat16, 2 * n)):
        found = torch.from_numpy(np.frombuffer(out, np.int16, n, at).copy()).view(dtype)
        torch.testing.assert_close(found, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    found = torch.from_numpy(np.frombuffer(out, np.float32, 1 << 17, 4 * n).copy())
    torch.testing.assert_close(found, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_nvcc_takes_the_same_kernels(tmp_path: Path) -> None:
    include = [f"-I{CSRC / 'include'}", f"-I{CSRC}"]
    command = ["nvcc", "-std=c++17", "-arch=sm_90", *include, "-cubin", str(KERNELS), "-o", str(tmp_path / "cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
