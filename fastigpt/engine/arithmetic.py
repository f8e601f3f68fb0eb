"""What the arithmetic of every engine promises: numbers are finite or an error says so, and what the caller has set in
torch (autocast, gradients) changes nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastigpt.config import ImageGPTConfig
from fastigpt.engine import Engine, Filled, Job
from fastigpt.errors import CheckpointError

Method = TypeVar("Method", bound=Callable[..., Any])
_SCORED_TOKENS = 2**14  # at a time
_SAFE = 1e37  # of float32's 3e38


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
        largest = tensor.detach().abs().max().item()
        raise CheckpointError(
            f"{name} holds {largest:g}, "
            + (
                f"which {str(dtype).removeprefix('torch.')} cannot hold"
                if math.isfinite(largest)
                else "which is no number"
            )
        )
    return result


def finite(values: torch.Tensor, engine: Engine) -> torch.Tensor:
    """These logits or hidden states, or CheckpointError."""
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(
            "the model's logits are not finite numbers: its weights are damaged, or too large for "
            f"{str(engine.dtype).removeprefix('torch.')} ({engine.name})"
        )
    return values


def cannot_overflow(config: ImageGPTConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether the sizes of the weights alone prove that every logit of every sequence is finite.

    Norms bound all: a normed state is at most √width · gain long, a linear layer lengthens by at most the root of its
    squares (Frobenius), attention averages, and x · sigmoid(1.702 x) is no longer than x.
    """
    if dtype == torch.float16:
        return False

    def length(name: str) -> float:
        return torch.linalg.vector_norm(weights[name], dtype=torch.float32).item() if name in weights else 0.0

    def longest(name: str) -> float:
        return weights[name].abs().max().item() if name in weights else 0.0

    root = math.sqrt(config.n_embd)
    words = root * max(
        longest("transformer.wte.weight") + longest("transformer.wpe.weight"),
        longest("prompt.wte.weight") + longest("prompt.wpe.weight"),
    )
    x, largest = words, 0.0
    for i in range(config.n_layer):
        block = f"transformer.h.{i}."

        def linear(into: float, name: str, block: str = block) -> float:
            return into * length(block + name + ".weight") + length(block + name + ".bias")

        qkv = linear(root * longest(block + "ln_1.weight"), "attn.c_attn")
        inner = linear(root * longest(block + "ln_2.weight"), "mlp.c_fc")
        # Attention sees values of many positions, each at most that long; heads side by side are one such vector.
        x += linear(qkv * root, "attn.c_proj") + linear(inner, "mlp.c_proj")
        largest = max(largest, qkv * qkv, inner, x * x)
    logits = root * longest("transformer.ln_f.weight") * length("lm_head.weight")
    return max(largest, x * x, logits) < _SAFE


def check_filled(engine: Engine, job: Job, filled: Filled) -> Filled:
    """For engines that draw where nobody can look on: scores what they drew, and raises CheckpointError if a logit is
    not finite. Only needed where `cannot_overflow` proves nothing."""
    prompts = [job.prompt] if job.prompt is None or job.drawing.guidance_scale is None else [job.prompt, None]
    step = max(1, _SCORED_TOKENS // engine.config.context)
    for first in range(0, len(filled.tokens), step):
        some = slice(first, first + step)
        for prompt in prompts:
            engine.logits(filled.tokens[some], None if prompt is None else prompt[some])
    return filled
