"""A model's weights on its device, laid out as the kernels like them, and what all launches of an engine share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastigpt.kernels import launch
from fastigpt.kernels.canvases import Head
from fastigpt.kernels.pairs import Turns, side_by_side
from fastigpt.ops.kv_cache import quantize_kv_reference
from fastigpt.spec import ROTARY, ModelSpec

Arrange = Callable[[torch.Tensor], torch.Tensor]
_ALIGNED = 8  # elements of a head are padded to a multiple of it, with zeros: else loads would be narrow


@dataclass(frozen=True)
class Linear:
    """weight: [out, in], of the model's dtype, or int8 with a scale for each output. bias, scale: float32 [out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None

    @property
    def operands(self) -> dict[str, Any]:
        """What `norm_linear` takes besides the weight."""
        return {"bias": self.bias, "weight_scale": self.scale}


@dataclass(frozen=True)
class BlockWeights:
    """Gains are float32. What rotary positions turn, and gates and ups, stand in pairs side by side (kernels/pairs.py);
    heads are padded."""

    norm_1: torch.Tensor
    qkv: Linear
    proj: Linear
    norm_2: torch.Tensor
    fc: Linear
    out: Linear


@dataclass(frozen=True)
class Model:
    """dtype: of activations, and of weights that are not int8. configs: the launch configurations. prefix_embedding,
    positions: [rows, width] as ModelSpec names them; turns: float32 [rows, head_dim / 2, 2], of rotary positions; of
    these two there is one. head_dim: of the heads as they are kept."""

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    configs: launch.Table
    blocks: tuple[BlockWeights, ...]
    head: Head
    prefix_embedding: torch.Tensor
    positions: torch.Tensor | None
    turns: torch.Tensor | None
    head_dim: int

    @property
    def epsilon(self) -> float:
        return self.spec.block.norm_epsilon

    @property
    def scale(self) -> float:
        """Of attention's scores."""
        return self.spec.block.head_dim**-0.5

    @property
    def sections(self) -> tuple[int, int, int]:
        """How many of qkv's outputs are queries, keys and values, padded heads and all."""
        block = self.spec.block
        return block.n_head * self.head_dim, block.n_kv_head * self.head_dim, block.n_kv_head * self.head_dim

    def turns_at(self, row: int, first: torch.Tensor, window: int) -> Turns | None:
        """Of windows that begin at rows row + first[b] of the table; None if positions are not rotary."""
        if self.turns is None:
            return None
        return Turns(self.turns[row:], first, window, sum(self.sections[:2]))

    def split(self, qkv: torch.Tensor, sequences: int) -> tuple[torch.Tensor, ...]:
        """q, k, v [sequences, T, heads, head_dim] of qkv [sequences · T, …]."""
        parts = qkv.view(sequences, -1, qkv.shape[-1]).split(self.sections, -1)
        return tuple(part.unflatten(-1, (-1, self.head_dim)) for part in parts)


def load(
    spec: ModelSpec,
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    configs: launch.Table,
    quantized: bool = False,
) -> Model:
    """weights: named and shaped as spec.weight_shapes() and spec.bias_shapes() say. quantized: those of the blocks'
    linear layers are kept in int8."""
    block_spec, rotary = spec.block, spec.positions == "rotary"
    head_dim = -(-block_spec.head_dim // _ALIGNED) * _ALIGNED

    def take(name: str, dtype: torch.dtype = dtype) -> torch.Tensor:
        return weights[name].to(device, dtype).contiguous()

    def as_they_are(x: torch.Tensor) -> torch.Tensor:
        return x

    def bias(name: str) -> torch.Tensor | None:
        return take(name + ".bias", torch.float32) if name + ".bias" in weights else None

    def linear(name: str, rows: Arrange = as_they_are, columns: Arrange = as_they_are) -> Linear:
        """rows, columns: how a weight's are arranged."""
        weight = rows(take(name + ".weight", torch.float32 if quantized else dtype))
        weight = columns(weight.T).T.contiguous()
        scale = None
        if quantized:
            weight, scale = quantize_kv_reference(weight, torch.int8)
        found = bias(name)
        return Linear(weight, None if found is None else rows(found), scale)

    def heads(x: torch.Tensor, pairs: bool) -> torch.Tensor:
        """[n · head_dim, …], the heads padded, with pairs side by side."""
        if head_dim == block_spec.head_dim and not pairs:
            return x
        x = x.unflatten(0, (-1, block_spec.head_dim))
        x = side_by_side(x, 1) if pairs else x
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, head_dim - block_spec.head_dim)).flatten(0, 1)

    def qkv(x: torch.Tensor) -> torch.Tensor:
        if head_dim == block_spec.head_dim and not rotary:
            return x
        q, k, v = x.split(block_spec.sections)
        return torch.cat([heads(q, rotary), heads(k, rotary), heads(v, False)])

    def gates_and_ups(x: torch.Tensor) -> torch.Tensor:
        return side_by_side(x).contiguous()

    def block(name: str) -> BlockWeights:
        return BlockWeights(
            take(name + ".norm_1", torch.float32),
            linear(name + ".qkv", qkv),
            linear(name + ".proj", columns=lambda x: heads(x, False)),
            take(name + ".norm_2", torch.float32),
            linear(name + ".fc", gates_and_ups if block_spec.mlp == "gated_silu" else as_they_are),
            linear(name + ".out"),
        )

    positions = None if rotary else take("positions")
    turns = F.pad(take(ROTARY, torch.float32), (0, 0, 0, (head_dim - block_spec.head_dim) // 2)) if rotary else None
    head = Head(
        take("norm", torch.float32), take("head.weight"), take("token.embedding"),
        # The last element of every prefix scores the first token; from its row on they are those of the canvas.
        None if positions is None else positions[spec.position_row(0, 1) :],
        spec.block.norm_epsilon, bias("head"), None if spec.head_inner is None else take("head.fc.weight"),
        bias("head.fc"),
    )  # fmt: skip
    blocks = tuple(block(f"blocks.{i}") for i in range(spec.n_layer))
    return Model(
        spec, device, dtype, kv_dtype, configs, blocks, head, take("prefix.embedding"), positions, turns, head_dim
    )
