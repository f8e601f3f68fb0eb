"""Weights so large that what a model computes leaves float32, though every one of them is finite.

Such a model need not show it: the norm of a state whose squares overflow is 0, its logits are all equal, and engines
differ in what becomes of infinite scores. So the sizes of the weights are looked at once; they prove every sane model
harmless. Where they prove nothing, each sequence is followed in float64.
"""

from __future__ import annotations

import math

import torch

from fastigpt.config import ImageGPTConfig
from fastigpt.engine.reference import ReferenceEngine
from fastigpt.errors import NotFiniteError

_LARGEST = torch.finfo(torch.float32).max
_SAFE = _LARGEST / 100
_SCORED_TOKENS = 2**12  # at a time


def cannot_overflow(config: ImageGPTConfig, weights: dict[str, torch.Tensor]) -> bool:
    """Whether the sizes of the weights alone prove that no sequence takes a number beyond float32.

    Norms bound all: a normed state is at most √width · gain long, a linear layer lengthens by at most the root of its
    squares (Frobenius), attention averages, and x · sigmoid(1.702 x) is no longer than x.
    """

    def length(name: str) -> float:
        return torch.linalg.vector_norm(weights[name].detach().float()).item() if name in weights else 0.0

    def longest(name: str) -> float:
        return weights[name].detach().abs().max().item() if name in weights else 0.0

    root = math.sqrt(config.n_embd)
    words = root * max(
        longest("transformer.wte.weight") + longest("transformer.wpe.weight"),
        longest("prompt.wte.weight") + longest("prompt.wpe.weight"),
    )
    x, largest = words, words * words
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


class OverflowWatch:
    """Follows sequences through a model in float64 and raises CheckpointError where float32 would overflow."""

    def __init__(self, config: ImageGPTConfig, weights: dict[str, torch.Tensor]) -> None:
        self._engine = _Watched(config, weights, device="cpu", dtype=torch.float64)

    def check(self, tokens: torch.Tensor, prompt: torch.Tensor | None = None) -> None:
        """tokens: int64 [B, T], all known. prompt: int64 [B, prompt_length] or None."""
        step = max(1, _SCORED_TOKENS // self._engine.config.context)
        for first in range(0, len(tokens), step):
            some = slice(first, first + step)
            self._engine.look(self._engine.logits(tokens[some], None if prompt is None else prompt[some]))


class _Watched(ReferenceEngine):
    def look(self, values: torch.Tensor) -> torch.Tensor:
        # Not "<=" and "not": NaN is to fail as well.
        if not values.abs().max().item() <= _LARGEST:
            raise NotFiniteError("its weights are too large: what it computes overflows float32, and is not finite")
        return values

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        self.look((x * x).sum(-1))
        return self.look(super().norm(x, name))

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = self.look(super().linear(x, name))
        if name.endswith(".c_attn"):
            lengths = y.unflatten(-1, (3, self.config.n_head, -1)).norm(dim=-1).amax((0, 1))  # [q k v, n_head]
            self.look(lengths[0] * lengths[1])  # no score is larger
        return y
