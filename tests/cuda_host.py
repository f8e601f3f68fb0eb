"""Builds CUDA sources for the host (csrc/cuda/host), watched by sanitizers, and runs the nearest centroid there."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastigpt import _C
from fastigpt.nearest import describe

CSRC = Path(__file__).parents[1] / "csrc"
COMPILER = os.environ.get("CXX", "g++")
SANITIZERS = {
    "races": ["-fsanitize=thread"],
    "bounds": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
OPTIONS = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
_DTYPES = ("float32", "bfloat16", "float16", "int8", "uint8")  # DType of csrc/include/fastigpt/dtype.h, in its order

needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")


def build(program: Path, watch: str, *sources: Path, defines: Sequence[str] = ()) -> Path:
    """Compiles CUDA and C++ sources into a program. watch: "races" or "bounds"."""
    flags = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off"]
    include = [f"-I{CSRC / folder}" for folder in ("cuda/host", "include", ".")]
    command = [COMPILER, *flags, *SANITIZERS[watch], *defines, "-pthread", *include, "-x", "c++", *map(str, sources)]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def run(program: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """rc and what was said."""
    command = [str(program), *map(str, arguments)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": 500}
    options["env"] = {**os.environ, **OPTIONS, **environment}
    done = subprocess.run(command, **options)
    if "unexpected memory mapping" in done.stderr:  # ThreadSanitizer, where addresses are more random than it knows
        done = subprocess.run(["setarch", "-R", *command], **options)
    return done


@dataclass(frozen=True)
class Case:
    """points: [..., D]; book: centroids [K, D], or a table of colours."""

    points: torch.Tensor
    book: torch.Tensor | _C.RgbTable
    distances: bool = True

    def packed(self) -> bytes:
        """As csrc/tests/run_nearest_centroid.cpp reads it."""
        x = describe("points", self.points)
        steps = [(size - 1) * stride for size, stride in zip(x.shape, x.strides)]
        low = x.address + sum(step for step in steps if step < 0) if self.points.numel() else x.address
        high = x.address + sum(step for step in steps if step > 0) + self.points.element_size()
        memory = ctypes.string_at(low, high - low) if self.points.numel() else b""
        if isinstance(self.book, torch.Tensor):
            kind, parts = 0, (self.book.float().contiguous().numpy().tobytes(), b"")
        else:
            kind, parts = 1, (self.book.cells(), self.book.blocks())
        numbers = [kind, _DTYPES.index(x.dtype), x.shape[-1], x.strides[-1], len(x.shape) - 1]
        numbers += [*x.shape[:-1], *x.strides[:-1], len(memory), x.address - low, low % 16]
        numbers += [len(parts[0]), len(parts[1]), int(self.distances)]
        return struct.pack(f"{len(numbers)}q", *numbers) + memory + parts[0] + parts[1]


def search(program: Path, cases: Sequence[Case], **environment: str) -> list[tuple[np.ndarray, np.ndarray]] | str:
    """Indices and distances of each case, of the shape of its points; or what the program complained about."""
    given, found = program.with_suffix(".in"), program.with_suffix(".out")
    given.write_bytes(b"".join(case.packed() for case in cases))
    done = run(program, given, found, **environment)
    if done.returncode or done.stderr:
        return done.stderr or f"rc {done.returncode}"
    out, results, at = found.read_bytes(), [], 0
    for case in cases:
        shape, n = case.points.shape[:-1], case.points[..., 0].numel()
        indices = np.frombuffer(out, np.int64, n, at).reshape(shape)
        results.append((indices, np.frombuffer(out, np.float32, n, at + 8 * n).reshape(shape)))
        at += 12 * n
    assert at == len(out)
    return results
