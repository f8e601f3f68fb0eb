"""Layers whose outputs belong together in pairs, which a kernel turns or gates before anybody reads them.

A head's elements p and p + head_dim / 2 are turned by one angle, and a gate multiplies its up. The rows of such weights
are laid side by side when they are loaded, so that whatever block of outputs a program makes holds both of a pair.
Queries and keys stay in that order: their products do not depend on it. This file needs no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fastigpt.kernels.launch import expect, expect_contiguous

Activation = Literal["quick_gelu", "gelu", "gated_silu"]
"""What follows a product: x · sigmoid(1.702 x), the exact GELU, or silu(gate) · up, half as many numbers, of pairs."""


def side_by_side(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """[…, 2 n, …] → the same shape: elements i and n + i of a dimension become its elements 2 i and 2 i + 1."""
    dim %= x.dim()
    return x.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def in_halves(x: torch.Tensor) -> torch.Tensor:
    """[…, 2 n] → the same shape: what `side_by_side` makes of the last dimension, undone."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


@dataclass(frozen=True)
class Turns:
    """By how much the queries and keys of rows are turned, where positions are rotary.

    table: float32 [positions, head_dim / 2, 2], cosine and sine of every pair. first, int32 [n], and window: row r of a
    product stands at position first[r // window % n] + r % window, at most the last of the table.
    columns: so many of the product's outputs, a multiple of head_dim, are turned: queries and keys.
    """

    table: torch.Tensor
    first: torch.Tensor
    window: int
    columns: int

    @property
    def head_dim(self) -> int:
        return 2 * self.table.shape[1]

    def check(self, outputs: int) -> None:
        """Raises ValueError if these are not turns of a product of so many outputs."""
        expect(self.table.dim() == 3 and self.table.shape[2] == 2, "turns must be [positions, head_dim / 2, 2]")
        expect(self.table.dtype == torch.float32, f"turns must be float32, not {self.table.dtype}")
        expect(self.first.dtype == torch.int32 and self.first.dim() == 1, "first positions must be int32 [n]")
        expect(self.window >= 1 and self.columns <= outputs, f"{self.columns} of {outputs} outputs cannot be turned")
        expect(self.columns % self.head_dim == 0, f"{self.columns} outputs are no heads of {self.head_dim}")
        expect_contiguous(turns=self.table, first=self.first)
