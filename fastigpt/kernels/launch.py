"""What all launchers share: the launch configurations, which are data, and the names of dtypes in them.

configs/ holds one JSON file per GPU family, with default.json for the rest. A file maps a kernel's name to rows
of settings; the first row is taken whose bounds hold: "upto", the size of the work, and for products "k_upto" and
"n_upto", inputs and outputs of the layer (the last row has none). Whoever has the GPU writes these files by
measurement: `python -m benchmarks.tune`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch

from fastigpt.operands import check_memory, contiguous

FOLDER = Path(__file__).parent / "configs"
Table = dict[str, list[dict[str, Any]]]

# How a cache stores numbers: "plain" in a float type of its own, or scaled to fit into 8 bits, one float32 scale for
# each key (or value) vector.
SCALED_TYPES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
PLAIN_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU. Fixed when triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_unavailable(device: torch.device) -> str | None:
    """A sentence that says why these kernels can't run on a device, or None if they can. Does not import triton."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if interpreting():
        return (
            None if device.type == "cpu" else f"TRITON_INTERPRET=1 runs kernels on the CPU, and the device is {device}"
        )
    if device.type != "cuda":
        return f"Triton kernels need a CUDA or ROCm GPU, and the device is {device}"
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"Triton kernels need compute capability 8.0, and {torch.cuda.get_device_name(device)} has {major}.{minor}"
        )
    return None


def stores_float8(device: torch.device) -> bool:
    """Whether kernels can convert float8_e4m3 here: NVIDIA from compute capability 8.9 on, and the interpreter."""
    if device.type != "cuda":
        return True
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)


def family(device: torch.device) -> str:
    """Name of the configuration file for a device: "sm90", "gfx942"; "interpreter" on the CPU, where programs
    run one after another, so few and large ones are best."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@functools.cache
def table(name: str) -> Table:
    """Configurations of a GPU family, or of a file in configs/ by its name; default.json where there is none."""
    path = FOLDER / f"{name}.json"
    return json.loads((path if path.exists() else FOLDER / "default.json").read_text())


BOUNDS = ("upto", "k_upto", "n_upto")


def settings(
    configs: Table, kernel: str, size: int, dtype: torch.dtype | None = None, *, k: int = 0, n: int = 0
) -> dict[str, Any]:
    """The settings of `kernel` for work of `size` (rows, keys …: see the kernel's launcher), without their bounds. k,
    n: inputs and outputs of a layer.

    Rows are for 16-bit types. Where a table has rows named "<kernel>_float32", float32 takes those: it has no tensor
    cores (TF32 would round), so blocks that the others hold easily would spill registers.
    """
    wide = f"{kernel}_float32"
    name = wide if dtype == torch.float32 and wide in configs else kernel
    row = first_row(configs[name], size, k=k, n=n)
    return {key: value for key, value in row.items() if key not in BOUNDS}


def first_row(rows: list[dict[str, Any]], size: int, *, k: int = 0, n: int = 0) -> dict[str, Any]:
    """The first row whose bounds hold, with them."""
    for row in rows:
        if all(found <= row.get(bound, found) for bound, found in zip(BOUNDS, (size, k, n))):
            return row
    raise KeyError("the last row of a table must have no bounds")


def expect(condition: bool, message: str) -> None:
    """Launchers state their shapes and dtypes with this: an assertion that survives `python -O`."""
    if not condition:
        raise ValueError(message)


def expect_memory(name: str, tensor: torch.Tensor) -> None:
    """The numbers of a tensor are what lies at its address; see fastigpt/operands.py."""
    check_memory(name, tensor)
    expect(not (tensor.is_neg() or tensor.is_conj()), f"{name} must not be a lazily negated or conjugated view")


def expect_contiguous(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            expect_memory(name, tensor)
            contiguous(name, tensor)


def padded_head(head_dim: int) -> int:
    """Head dim as the kernels hold it: a power of two, as tl.arange wants, and at least 16, as tl.dot does."""
    return max(16, 1 << (head_dim - 1).bit_length())


def row_stride(name: str, x: torch.Tensor) -> int:
    """x: [n, W, n_head, head_dim] whose n · W rows are equally far apart and contiguous inside (part of a fused qkv):
    the distance between rows."""
    expect_memory(name, x)
    n, window, n_head, head_dim = x.shape
    stride = x.stride(1) if window > 1 else x.stride(0) if n > 1 else n_head * head_dim
    inside = (n_head == 1 or x.stride(2) == head_dim) and x.stride(3) == 1
    if not inside or not (n == 1 or x.stride(0) == window * stride):
        raise ValueError(f"{name} must have contiguous rows that are equally far apart, not strides {x.stride()}")
    return stride
