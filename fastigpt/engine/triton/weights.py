"""A model's weights on its device, and what all launches of an engine share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastigpt.kernels import launch
from fastigpt.kernels.canvases import Head
from fastigpt.spec import ModelSpec


@dataclass(frozen=True)
class BlockWeights:
    """Gains and biases float32, linears [out, in]."""

    norm_1: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    proj: torch.Tensor
    proj_bias: torch.Tensor | None
    norm_2: torch.Tensor
    fc: torch.Tensor
    fc_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None


@dataclass(frozen=True)
class Model:
    """prefix_embedding, positions: [rows, width] as ModelSpec names them. configs: the launch configurations."""

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    configs: launch.Table
    blocks: tuple[BlockWeights, ...]
    head: Head
    prefix_embedding: torch.Tensor
    positions: torch.Tensor

    @property
    def epsilon(self) -> float:
        return self.spec.block.norm_epsilon


def load(
    spec: ModelSpec,
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    configs: launch.Table,
) -> Model:
    """weights: named and shaped as spec.weight_shapes() and spec.bias_shapes() say."""

    def take(name: str, dtype: torch.dtype = dtype) -> torch.Tensor:
        return weights[name].to(device, dtype).contiguous()

    def linear(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return take(name + ".weight"), take(name + ".bias", torch.float32) if name + ".bias" in weights else None

    def block(name: str) -> BlockWeights:
        return BlockWeights(
            take(name + ".norm_1", torch.float32),
            *linear(name + ".qkv"),
            *linear(name + ".proj"),
            take(name + ".norm_2", torch.float32),
            *linear(name + ".fc"),
            *linear(name + ".out"),
        )

    positions = take("positions")
    head = Head(
        take("norm", torch.float32),
        take("head.weight"),
        take("token.embedding"),
        # The last element of every prefix scores the first token; from its row on they are those of the canvas.
        positions[spec.position_row(0, 1) :],
        spec.block.norm_epsilon,
    )
    blocks = tuple(block(f"blocks.{i}") for i in range(spec.n_layer))
    return Model(spec, device, dtype, kv_dtype, configs, blocks, head, take("prefix.embedding"), positions)
