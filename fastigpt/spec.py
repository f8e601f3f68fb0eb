"""What a model is to the engines: sizes, and one name and one orientation for every tensor, whatever family it is of.

A model reads a prefix (words, a class, a start token) and then tokens of a canvas in raster order:

    inputs    prefix₀ … prefix_{L−1}, x₀, x₁, … x_{n−2}        outputs    x₀ is scored by prefix_{L−1}, x_{i+1} by x_i

Prefix ids and canvas tokens have embeddings of their own. Positions are learned: the last element of every prefix,
however long, stands in row `prefix_length` − 1 of the position table, so that canvas positions do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BlockSpec:
    """One block: x += proj(attention(qkv(norm_1(x)))), x += out(quick_gelu(fc(norm_2(x)))), with norms without a mean.

    n_head heads of head_dim, so a width of n_head · head_dim; n_inner: width of the MLP; norm_epsilon: under the root.
    """

    n_head: int
    head_dim: int
    n_inner: int
    norm_epsilon: float


@dataclass(frozen=True)
class ModelSpec:
    """n_layer blocks of `width`; canvases of height × columns; n_tokens: the head's outputs; n_prefix_tokens: rows of
    the prefix's embedding; prefix_length: elements of the longest prefix; unconditional: the prefix that says
    nothing."""

    n_layer: int
    width: int
    block: BlockSpec
    height: int
    columns: int
    n_tokens: int
    n_prefix_tokens: int
    prefix_length: int
    unconditional: tuple[int, ...]

    @property
    def n_positions(self) -> int:
        """Tokens of a canvas."""
        return self.height * self.columns

    @property
    def context(self) -> int:
        """Longest sequence the model reads: the longest prefix, and every token but the last."""
        return self.prefix_length + self.n_positions - 1

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor an engine needs. Linear weights are [out, in]."""
        d, f = self.width, self.block.n_inner
        shapes: dict[str, tuple[int, ...]] = {
            "prefix.embedding": (self.n_prefix_tokens, d),
            "token.embedding": (self.n_tokens, d),
            "positions": (self.context, d),
            "norm": (d,),
            "head.weight": (self.n_tokens, d),
        }
        for i in range(self.n_layer):
            shapes |= {
                f"blocks.{i}.norm_1": (d,),
                f"blocks.{i}.qkv.weight": (3 * d, d),
                f"blocks.{i}.proj.weight": (d, d),
                f"blocks.{i}.norm_2": (d,),
                f"blocks.{i}.fc.weight": (f, d),
                f"blocks.{i}.out.weight": (d, f),
            }
        return shapes

    def bias_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor an engine takes besides."""
        return {
            name.removesuffix("weight") + "bias": shape[:1]
            for name, shape in self.weight_shapes().items()
            if name.startswith("blocks.") and name.endswith(".weight")
        }

    def prefix_rows(self, prefixes: Iterable[tuple[int, ...]]) -> torch.Tensor:
        """int64 [n, L]: prefixes of one length as a tensor."""
        return torch.tensor(list(prefixes), dtype=torch.int64, device="cpu")

    def position_row(self, slot: int, prefix_length: int) -> int:
        """Row of the position table for input `slot` of a sequence whose prefix has so many elements."""
        return slot + self.prefix_length - prefix_length
