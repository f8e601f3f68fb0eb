"""Tensors of a published checkpoint, taken by name once their shapes are known to be right."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastigpt.codecs.vq import VQConfig
from fastigpt.errors import CheckpointError
from fastigpt.tensor_files import Stored, some
from fastigpt.untrusted import short


def take(stored: Stored, shapes: Mapping[str, tuple[int, ...]], source: str) -> dict[str, torch.Tensor]:
    """The tensors of these names, in memory of their own. CheckpointError names `source`, and what is missing or
    misshapen or holds no floating-point numbers."""
    missing = sorted(shapes.keys() - stored.keys())
    if missing:
        raise CheckpointError(f"{source} lacks {some(missing)}")
    found = {}
    for name, shape in shapes.items():
        tensor = stored[name]()
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{source}: {name} has the shape {list(tensor.shape)}, expected {list(shape)}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source}: {name} holds {tensor.dtype}, expected floating-point numbers")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{source}: {name} holds numbers that are not finite")
        found[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return found


def take_vq(stored: Stored, source: str) -> tuple[VQConfig, dict[str, torch.Tensor]]:
    """A VQ and its tensors, under the names of codecs/vq.py."""
    try:
        config = VQConfig.of({name: tuple(read().shape) for name, read in stored.items()})
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
