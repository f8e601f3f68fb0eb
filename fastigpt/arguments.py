"""Checks what users hand over, before any work starts. Each error names the argument, what was found, what was
expected."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from fastigpt.operands import readable
from fastigpt.scalars import shown, whole
from fastigpt.spec import ModelSpec

OUTPUT_TYPES = ("pil", "np", "pt", "tokens")


def window_size(window: int | str, pixels: int) -> int | Literal["auto"]:
    """A window wider than the canvas is as wide as the canvas: engines need memory for all of it."""
    if isinstance(window, str):
        if window != "auto":
            raise ValueError(f'window must be "auto" or an int of at least 1, not {window!r}')
        return "auto"
    return min(whole("window", window, 1, expected='"auto" or an int'), pixels)


def output_kind(output_type: str) -> str:
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {shown(output_type)}")
    return output_type


def flag(name: str, value: Any) -> bool:
    """`value` as True or False, whatever has one of the two."""
    try:
        return bool(value)
    except Exception:  # arrays and tensors of several numbers, or of none
        raise TypeError(f"{name} must be True or False, not {shown(value)}") from None


def token_array(
    name: str, tokens: Any, spec: ModelSpec, *, unknown: bool = False, whole_canvas: bool = False
) -> torch.Tensor:
    """int64 [B, T] on the CPU, contiguous, from a tensor or an array. `unknown`: −1 is allowed. `whole_canvas`: T must
    be height · width."""
    tokens = int64_tensor(name, tokens)
    if tokens.ndim != 2 or len(tokens) == 0:
        raise ValueError(f"{name} must have shape [B, T] with B at least 1, not {list(tokens.shape)}")
    length, most = tokens.shape[1], spec.n_positions
    if whole_canvas and length != most:
        raise ValueError(f"{name} must have {most} tokens per image ({spec.height} × {spec.columns}), not {length}")
    if not 1 <= length <= most:
        raise ValueError(f"{name} must have 1 to {most} tokens per image, not {length}")
    low, high = int(tokens.min()), int(tokens.max())
    lowest = -1 if unknown else 0
    if low < lowest or high >= spec.n_tokens:
        raise ValueError(f"{name} must be between {lowest} and {spec.n_tokens - 1}; found {low} to {high}")
    return tokens.contiguous()


def is_int64(values: Any) -> bool:
    """Whether it is a tensor or an array of 64-bit integers: tokens, where images might be meant as well."""
    if isinstance(values, np.ndarray):
        return values.dtype.kind == "i" and values.dtype.itemsize == 8
    return isinstance(values, torch.Tensor) and values.dtype == torch.int64


def int64_tensor(name: str, values: Any) -> torch.Tensor:
    """An int64 tensor on the CPU from a tensor or an array; TypeError for other kinds and dtypes."""
    if not isinstance(values, (np.ndarray, torch.Tensor)):
        raise TypeError(f"{name} must be an int64 tensor or array, not {type(values).__name__}")
    if not is_int64(values):
        raise TypeError(f"{name} must be of dtype int64, not {values.dtype}")
    if isinstance(values, np.ndarray):  # a copy: also of read-only and big-endian arrays
        return torch.from_numpy(np.array(values, dtype=np.int64))
    return plain_tensor(name, values)


def plain_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in a dense tensor on the CPU, without gradient, negation and conjugation carried out.

    Raises what `operands.readable` does.
    """
    return readable(name, tensor).detach().cpu()
