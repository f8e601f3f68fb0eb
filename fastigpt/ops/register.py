"""How an operator is made known to PyTorch: torch.ops.fastigpt.<name>."""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("fastigpt", "DEF")


def register(schema: str, run: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]) -> None:
    """schema: "name(Tensor x, …) -> Tensor". run: the operator. fake: its result's shape and dtype without values;
    PyTorch goes there for fake tensors and wherever any operand is on the meta device, the others being what they are.
    """
    _library.define(schema)
    name = schema.partition("(")[0]
    # For every kind of tensor, so that what is not ours is refused in our words (operands.py). PyTorch would work out
    # lazily negated and zero tensors before it comes here, but cannot where they are to be changed.
    for key in ("CompositeExplicitAutograd", "AutogradNestedTensor"):
        _library.impl(name, run, key)
    for key in ("Conjugate", "Negative", "ZeroTensor"):
        _library.impl(name, torch.library.fallthrough_kernel, key)
    torch.library.register_fake(f"fastigpt::{name}", fake, lib=_library)
