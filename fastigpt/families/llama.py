"""What the families of Llama's blocks have in common: their spec, and their weights as engines want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from fastigpt.spec import BlockSpec, ModelSpec


class LlamaSizes(Protocol):
    """Of the blocks and the canvas, as both families' configurations name them."""

    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_kv_head(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def n_inner(self) -> int: ...
    @property
    def norm_epsilon(self) -> float: ...
    @property
    def n_codes(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def columns(self) -> int: ...


def spec(sizes: LlamaSizes, **others: Any) -> ModelSpec:
    """others: the fields of a ModelSpec that the sizes do not tell."""
    return ModelSpec(
        n_layer=sizes.n_layer,
        width=sizes.width,
        block=BlockSpec(sizes.n_head, sizes.n_kv_head, sizes.head_dim, sizes.n_inner, sizes.norm_epsilon, "gated_silu"),
        height=sizes.height,
        columns=sizes.columns,
        n_tokens=sizes.n_codes,
        positions="rotary",
        **others,
    )


Maker = Callable[[], torch.Tensor]


def renamed(weights: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, Maker]:
    """Makers (see lazy_tensors.Tensors) of the tensors that engines and a checkpoint call by these names."""
    return {ours: partial(weights.__getitem__, theirs) for ours, theirs in names.items()}


def fused(weights: Mapping[str, torch.Tensor], names: Sequence[str]) -> Maker:
    """That of the rows of these tensors, one after the other."""
    return lambda: torch.cat([weights[name] for name in names])
