"""Tensors of a published checkpoint, taken by name once their shapes are known to be right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from fastigpt.codecs.vq import VQConfig
from fastigpt.errors import CheckpointError
from fastigpt.lazy_tensors import Held, Stored
from fastigpt.tensor_files import some
from fastigpt.tensors import Tensors
from fastigpt.untrusted import short

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def take(stored: Held, shapes: Mapping[str, tuple[int, ...]], source: str) -> Tensors:
    """The tensors of these names, read when they are asked for. CheckpointError names `source`, and what is missing or
    misshapen or holds no floating-point numbers; and, when it is read, what is not finite."""
    missing = sorted(shapes.keys() - stored.keys())
    if missing:
        raise CheckpointError(f"{source} lacks {some(missing)}")
    for name, shape in shapes.items():
        check(stored[name], name, shape, source)
    readers = {name: reader for name in shapes if (reader := stored[name].row) is not None}
    return Tensors({name: _finite(stored[name], name, source) for name in shapes}, readers)


def check(
    found: Stored, name: str, shape: tuple[int, ...], source: str, *, whole: bool = True, asks: str = "expected"
) -> None:
    """Before memory is taken for it. whole: every number must be stored, none repeated by a stride of 0. asks: who
    wants this shape."""
    if found.odd is not None:
        raise CheckpointError(f"{source}: {name} is {found.odd}, expected a plain dense tensor")
    if found.shape != shape:
        raise CheckpointError(f"{source}: {name} has the shape {list(found.shape)}, {asks} {list(shape)}")
    if found.dtype not in _FLOATS:
        holds = found.dtype or "numbers of a dtype that torch does not have"
        raise CheckpointError(f"{source}: {name} holds {holds}, expected floating-point numbers")
    if whole and not found.whole:
        raise CheckpointError(f"{source}: {name} has {math.prod(shape)} numbers, of which not all are stored")


def _finite(stored: Stored, name: str, source: str) -> Callable[[], torch.Tensor]:
    looked = False

    def read() -> torch.Tensor:
        nonlocal looked
        tensor = stored.read().detach().contiguous()
        if not looked and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{source}: {name} holds numbers that are not finite")
        looked = True
        return tensor

    return read


def take_vq(stored: Held, source: str) -> tuple[VQConfig, Tensors]:
    """A VQ and its tensors, under the names of codecs/vq.py."""
    try:
        config = VQConfig.of({name: tensor.shape for name, tensor in stored.items()})
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{source} holds no VQ that is known: {short(error.args[0])} is missing") from None
    if config.base % 32 or not all(config.multipliers) or config.res_blocks < 1:
        raise CheckpointError(f"{source} holds a VQ of impossible sizes: {config}")
    return config, take(stored, config.tensor_shapes(), source)


def halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows [heads · head_dim, …] of queries or keys whose adjacent elements are turned together, in an order in which
    element p is turned with p + head_dim / 2."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)
