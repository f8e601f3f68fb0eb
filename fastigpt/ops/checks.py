"""What operators accept. Each error names the argument, what was found and what was expected."""

from __future__ import annotations

import torch

from fastigpt.kernels.launch import PLAIN_TYPES
from fastigpt.operands import contiguous

OPTIONAL = (
    "k_scale", "v_scale", "prefix_k", "prefix_v", "prefix_k_scale", "prefix_v_scale", "prefix_lengths", "known",
    "unconditional",
)  # fmt: skip
"""Arguments that may be None."""


def need_tensors(**given: object) -> None:
    """PyTorch says so too, in an error of another kind."""
    for name, x in given.items():
        if not isinstance(x, torch.Tensor) and not (x is None and name in OPTIONAL):
            raise TypeError(f"{name} must be a torch tensor, not {type(x).__name__}")


def check_shape(name: str, x: torch.Tensor, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {list(expected)}, not {list(x.shape)}")


def check_dtype(name: str, x: torch.Tensor, *allowed: torch.dtype) -> None:
    if x.dtype not in allowed:
        raise TypeError(f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in allowed)}, not {x.dtype}")


def check_qkv_types(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    check_dtype("q", q, *PLAIN_TYPES)
    check_dtype("k", k, q.dtype)
    check_dtype("v", v, q.dtype)


def check_contiguous(**tensors: torch.Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None:
            contiguous(name, x)
