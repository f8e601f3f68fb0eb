"""Single numbers that users hand over, as int and float: Python's, numpy's, and arrays and tensors of one element."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

from fastigpt.operands import readable


def integer(name: str, value: Any, expected: str = "an int") -> int:
    """`value` as an int. TypeError for anything else, bools included."""
    number = _item(name, value, expected)
    try:
        return operator.index(number)
    except TypeError:
        raise _wrong(name, value, expected) from None


def whole(name: str, value: Any, minimum: int, maximum: int | None = None, expected: str = "an int") -> int:
    """`value` as an int in [minimum, maximum]. TypeError for what is none, ValueError for one outside."""
    number = integer(name, value, expected)
    if number < minimum or (maximum is not None and number > maximum):
        allowed = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise ValueError(f"{name} must be {allowed}, not {shown(number)}")
    return number


def real(name: str, value: Any, expected: str = "a number") -> float:
    """`value` as a float, which may be infinite or NaN. TypeError for anything else, bools and complex included."""
    number = _item(name, value, expected)
    if isinstance(number, (str, bytes, complex, np.complexfloating)):
        raise _wrong(name, value, expected)
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name} must be finite, not {shown(value)}") from None
    except (TypeError, ValueError):
        raise _wrong(name, value, expected) from None


def _item(name: str, value: Any, expected: str) -> Any:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise _wrong(name, value, expected)
        value = readable(name, value).item()
    elif isinstance(value, np.ndarray):
        if value.size != 1:
            raise _wrong(name, value, expected)
        value = value.item()
    if isinstance(value, (bool, np.bool_)):
        raise _wrong(name, value, expected)
    return value


def _wrong(name: str, value: Any, expected: str) -> TypeError:
    return TypeError(f"{name} must be {expected}, not {shown(value)}")


def shown(value: Any) -> str:
    """For a message: of any value, what fits into a line."""
    if isinstance(value, torch.Tensor) and value.is_nested:  # has no shape
        return f"a nested tensor of dtype {value.dtype}"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {list(value.shape)} and dtype {value.dtype}"
    if isinstance(value, int) and abs(value) >= 10**40:  # beyond some length Python prints none at all
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
