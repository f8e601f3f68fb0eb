"""What the arithmetic of every engine promises: numbers are finite or an error says so, and what the caller has set in
torch (autocast, gradients) changes nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch

from fastigpt.engine import Engine
from fastigpt.errors import CheckpointError, NotFiniteError
from fastigpt.scalars import shown

Method = TypeVar("Method", bound=Callable[..., Any])


def undisturbed(method: Method) -> Method:
    """An engine's method that computes in the engine's own dtype, without gradients."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


def checked_dtypes(
    engine: str,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    allowed: Collection[torch.dtype],
    scaled: Collection[torch.dtype] = (),
) -> tuple[torch.dtype, torch.dtype]:
    """dtype and kv_dtype of an engine that computes in one of `allowed` and keeps its cache in the same (None), or in
    one of `scaled`. ValueError for others."""
    if dtype not in allowed:
        raise ValueError(f"dtype must be {_either(allowed)} on the {engine} engine, not {shown(dtype)}")
    caches = (dtype, *scaled)
    if kv_dtype is not None and kv_dtype not in caches:
        raise ValueError(
            f"kv_dtype must be {_either(caches)} on the {engine} engine in {_either([dtype])}, not {shown(kv_dtype)}"
        )
    return dtype, kv_dtype or dtype


def _either(dtypes: Collection[torch.dtype]) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def converted(name: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A weight as an engine keeps it. CheckpointError if a number of it is too large for the dtype, or not finite."""
    result = tensor.detach().to(device, dtype)
    if not bool(torch.isfinite(result).all()):
        raise does_not_fit(name, tensor, dtype)
    return result


def does_not_fit(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> CheckpointError:
    """The error for a weight of which a number is too large for the dtype, or not finite."""
    largest = tensor.detach().abs().max().item()
    number = str(dtype).removeprefix("torch.")
    what = f"which {number} cannot hold" if math.isfinite(largest) else "which is not finite"
    return CheckpointError(f"{name} holds {largest:g}, {what}")


def finite(values: torch.Tensor, engine: Engine) -> torch.Tensor:
    """These logits or hidden states, or CheckpointError."""
    if not bool(torch.isfinite(values).all()):
        raise NotFiniteError(
            "the model's logits are not finite numbers: its weights are damaged, or too large for "
            f"{str(engine.dtype).removeprefix('torch.')} ({engine.name})"
        )
    return values
