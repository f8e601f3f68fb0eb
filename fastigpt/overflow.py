"""Weights so large that what a model computes leaves float32, though every one of them is finite.

Such a model need not show it: the norm of a state whose squares overflow is 0, its logits are all equal, and engines
differ in what becomes of infinite scores. So the sizes of the weights are looked at once; they prove every sane model
harmless. Where they prove nothing, each sequence is followed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fastigpt.engine.reference import ReferenceEngine
from fastigpt.errors import NotFiniteError
from fastigpt.spec import ROTARY, ModelSpec

_LARGEST = torch.finfo(torch.float32).max
_SAFE = _LARGEST / 100
_SCORED_TOKENS = 2**12  # at a time


def cannot_overflow(spec: ModelSpec, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the sizes of the weights alone prove that no sequence takes a number beyond float32.

    Norms bound all: a normed state is at most √width · gain long, a linear layer lengthens by at most the root of its
    squares (Frobenius), attention averages, a rotation lengthens by at most its largest factor, x · sigmoid(1.702 x)
    and gelu(x) are no longer than x, and silu(gate) · up is no longer than both lengths' product.
    """

    def norm(name: str, order: float) -> float:
        if name not in weights:
            return 0.0
        tensor = weights[name].detach()
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        return torch.linalg.vector_norm(tensor, order, dtype=dtype).item()

    def length(name: str) -> float:
        return norm(name, 2)

    def longest(name: str) -> float:
        return norm(name, math.inf)

    root = math.sqrt(spec.width)
    inputs = root * (max(longest("prefix.embedding"), longest("token.embedding")) + longest("positions"))
    turned = 2 * longest(ROTARY) if ROTARY in weights else 1.0
    x, largest = inputs, inputs * inputs
    for i in range(spec.n_layer):
        block = f"blocks.{i}."

        def linear(into: float, name: str, block: str = block) -> float:
            return into * length(block + name + ".weight") + length(block + name + ".bias")

        qkv = linear(root * longest(block + "norm_1"), "qkv")
        inner = linear(root * longest(block + "norm_2"), "fc")
        if spec.block.mlp == "gated_silu":
            inner *= inner
        # Attention sees values of many positions, each at most that long; heads side by side are one such vector.
        x += linear(qkv * math.sqrt(spec.block.sections[0]), "proj") + linear(inner, "out")
        score = turned * qkv
        largest = max(largest, score * score, inner, x * x)  # products, which end at infinity; powers raise
    logits = root * longest("norm")
    if spec.head_inner is not None:
        logits = logits * length("head.fc.weight") + length("head.fc.bias")
    logits = logits * length("head.weight") + length("head.bias")
    return max(largest, x * x, logits) < _SAFE


class OverflowWatch:
    """Follows sequences through a model in float64 and raises CheckpointError where float32 would overflow."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, torch.Tensor]) -> None:
        self._engine = _Watched(spec, weights, device="cpu", dtype=torch.float64)

    def check(self, tokens: torch.Tensor, prefix: torch.Tensor | None = None) -> None:
        """tokens: int64 [B, T], all known. prefix: int64 [B, L]; None: the unconditional one."""
        step = max(1, _SCORED_TOKENS // self._engine.spec.context)
        for first in range(0, len(tokens), step):
            some = slice(first, first + step)
            self._engine.look(self._engine.logits(tokens[some], None if prefix is None else prefix[some]))


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
        if name.endswith(".qkv"):
            block = self.spec.block
            q, k, _ = (part.unflatten(-1, (-1, block.head_dim)) for part in y.split(block.sections, -1))
            q, k = (part.norm(dim=-1).amax((0, 1)) for part in (q, k))  # [n_head], [n_kv_head]
            self.look(q * k.repeat_interleave(block.n_head // block.n_kv_head))  # no score is larger
        return y
