"""What the arithmetic of every engine promises: numbers are finite or an error says so, and what the caller has set in
torch (autocast, gradients) changes nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastigpt.engine import Engine, Filled, Job
from fastigpt.errors import CheckpointError, NotFiniteError

Method = TypeVar("Method", bound=Callable[..., Any])
_SCORED_TOKENS = 2**14  # at a time


def undisturbed(method: Method) -> Method:
    """An engine's method that computes in the engine's own dtype, without gradients."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


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


def check_filled(engine: Engine, job: Job, filled: Filled) -> Filled:
    """Scores what was drawn where nobody could look on, and raises CheckpointError if a logit is not finite."""
    prompts = [job.prompt] if job.prompt is None or job.drawing.guidance_scale is None else [job.prompt, None]
    step = max(1, _SCORED_TOKENS // engine.config.context)
    for first in range(0, len(filled.tokens), step):
        some = slice(first, first + step)
        for prompt in prompts:
            engine.logits(filled.tokens[some], None if prompt is None else prompt[some])
    return filled
