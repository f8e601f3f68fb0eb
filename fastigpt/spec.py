"""What a model is to the engines: sizes, and one name and one orientation for every tensor, whatever family it is of.

A model reads a prefix (words, a class, a start token) and then tokens of a canvas in raster order:

    inputs    prefix₀ … prefix_{L−1}, x₀, x₁, … x_{n−2}        outputs    x₀ is scored by prefix_{L−1}, x_{i+1} by x_i

Prefix ids and canvas tokens have embeddings of their own. Positions are rows of a table, of vectors that are added to
the inputs or of angles by which queries and keys are turned: the last element of every prefix, however long, stands in
row `prefix_length` − 1, so that canvas positions do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

ROTARY = "rotary"
"""The table of rotary positions among a model's weights. Engines keep it in float32 at least."""


@dataclass(frozen=True)
class BlockSpec:
    """One block: x += proj(attention(qkv(norm_1(x)))), x += out(mlp(fc(norm_2(x)))), with norms without a mean.

    n_head query heads and n_kv_head heads of keys and values, each for n_head / n_kv_head neighbouring query heads, all
    of head_dim; n_inner: width of the MLP; norm_epsilon: under the root. mlp: "quick_gelu" of fc, or "gated_silu":
    silu(gate) · up, where fc gives the n_inner gates and then the n_inner ups.
    """

    n_head: int
    n_kv_head: int
    head_dim: int
    n_inner: int
    norm_epsilon: float
    mlp: Literal["quick_gelu", "gated_silu"] = "quick_gelu"

    @property
    def sections(self) -> tuple[int, int, int]:
        """How many of qkv's outputs are queries, keys and values."""
        return self.n_head * self.head_dim, self.n_kv_head * self.head_dim, self.n_kv_head * self.head_dim


@dataclass(frozen=True)
class ModelSpec:
    """n_layer blocks of `width`; canvases of height × columns; n_tokens: the head's outputs; n_prefix_tokens: rows of
    the prefix's embedding; prefix_length: elements of the longest prefix; unconditional: the prefix that says nothing.
    positions: "learned", a table of vectors, or "rotary", one of cosines and sines. head_inner: width of the head's
    hidden layer, whose activation is the exact GELU; None: the head is linear."""

    n_layer: int
    width: int
    block: BlockSpec
    height: int
    columns: int
    n_tokens: int
    n_prefix_tokens: int
    prefix_length: int
    unconditional: tuple[int, ...]
    positions: Literal["learned", "rotary"] = "learned"
    head_inner: int | None = None

    @property
    def n_positions(self) -> int:
        """Tokens of a canvas."""
        return self.height * self.columns

    @property
    def context(self) -> int:
        """Longest sequence the model reads: the longest prefix, and every token but the last."""
        return self.prefix_length + self.n_positions - 1

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor an engine needs. Linear weights are [out, in]. "rotary" holds, for each row of the
        position table and each pair p of a head's elements, p and p + head_dim / 2, the cosine and the sine of the
        angle by which the pair is turned; any two numbers do, such as zeros where an input is to have neither query
        nor key."""
        block, d, f = self.block, self.width, self.block.n_inner
        shapes: dict[str, tuple[int, ...]] = {
            "prefix.embedding": (self.n_prefix_tokens, d),
            "token.embedding": (self.n_tokens, d),
            "norm": (d,),
            "head.weight": (self.n_tokens, d if self.head_inner is None else self.head_inner),
        }
        if self.positions == "learned":
            shapes["positions"] = (self.context, d)
        else:
            shapes[ROTARY] = (self.context, block.head_dim // 2, 2)
        if self.head_inner is not None:
            shapes["head.fc.weight"] = (self.head_inner, d)
        for i in range(self.n_layer):
            shapes |= {
                f"blocks.{i}.norm_1": (d,),
                f"blocks.{i}.qkv.weight": (sum(block.sections), d),
                f"blocks.{i}.proj.weight": (d, block.sections[0]),
                f"blocks.{i}.norm_2": (d,),
                f"blocks.{i}.fc.weight": (2 * f if block.mlp == "gated_silu" else f, d),
                f"blocks.{i}.out.weight": (d, f),
            }
        return shapes

    def bias_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor an engine takes besides."""
        linear_head = self.head_inner is None
        return {
            name.removesuffix("weight") + "bias": shape[:1]
            for name, shape in self.weight_shapes().items()
            if name.endswith(".weight") and not (linear_head and name == "head.weight")
        }

    def prefix_rows(self, prefixes: Iterable[tuple[int, ...]]) -> torch.Tensor:
        """int64 [n, L]: prefixes of one length as a tensor."""
        return torch.tensor(list(prefixes), dtype=torch.int64, device="cpu")

    def by_length(self, prefixes: Sequence[tuple[int, ...]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Which of the prefixes have one length, and those as a tensor; for each length."""
        for length in sorted({len(prefix) for prefix in prefixes}):
            index = [i for i, prefix in enumerate(prefixes) if len(prefix) == length]
            yield index, self.prefix_rows(prefixes[i] for i in index)

    def position_row(self, slot: int, prefix_length: int) -> int:
        """Row of the position table for input `slot` of a sequence whose prefix has so many elements."""
        return slot + self.prefix_length - prefix_length
