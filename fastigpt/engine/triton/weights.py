"""A model's weights on its device, laid out as the kernels like them, and what all launches of an engine share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastigpt.kernels import launch
from fastigpt.kernels.canvases import Head
from fastigpt.kernels.pairs import Turns, side_by_side
from fastigpt.spec import ROTARY, ModelSpec

Arrange = Callable[[torch.Tensor], torch.Tensor]
_ALIGNED = 8  # elements of a head are padded to a multiple of it, with zeros: else loads would be narrow


@dataclass(frozen=True)
class BlockWeights:
    """Gains and biases float32, linears [out, in]. What rotary positions turn, and gates and ups, stand in pairs side
    by side (kernels/pairs.py); heads are padded."""

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
    """prefix_embedding, positions: [rows, width] as ModelSpec names them; turns: float32 [rows, head_dim / 2, 2], of
    rotary positions; of these two there is one. configs: the launch configurations. head_dim: of the heads as they are
    kept."""

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
    weights: dict[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    configs: launch.Table,
) -> Model:
    """weights: named and shaped as spec.weight_shapes() and spec.bias_shapes() say."""
    block_spec, rotary = spec.block, spec.positions == "rotary"
    head_dim = -(-block_spec.head_dim // _ALIGNED) * _ALIGNED

    def take(name: str, dtype: torch.dtype = dtype) -> torch.Tensor:
        return weights[name].to(device, dtype).contiguous()

    def as_they_are(x: torch.Tensor) -> torch.Tensor:
        return x

    def linear(name: str, arranged: Arrange = as_they_are) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = arranged(take(name + ".bias", torch.float32)) if name + ".bias" in weights else None
        return arranged(take(name + ".weight")), bias

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
            *linear(name + ".qkv", qkv),
            heads(take(name + ".proj.weight").T, False).T.contiguous(),
            take(name + ".proj.bias", torch.float32) if name + ".proj.bias" in weights else None,
            take(name + ".norm_2", torch.float32),
            *linear(name + ".fc", gates_and_ups if block_spec.mlp == "gated_silu" else as_they_are),
            *linear(name + ".out"),
        )

    positions = None if rotary else take("positions")
    turns = F.pad(take(ROTARY, torch.float32), (0, 0, 0, (head_dim - block_spec.head_dim) // 2)) if rotary else None
    head_weight, head_bias = linear("head")
    inner_weight, inner_bias = (None, None) if spec.head_inner is None else linear("head.fc")
    head = Head(
        take("norm", torch.float32), head_weight, take("token.embedding"),
        # The last element of every prefix scores the first token; from its row on they are those of the canvas.
        None if positions is None else positions[spec.position_row(0, 1) :],
        spec.block.norm_epsilon, head_bias, inner_weight, inner_bias,
    )  # fmt: skip
    blocks = tuple(block(f"blocks.{i}") for i in range(spec.n_layer))
    return Model(
        spec, device, dtype, kv_dtype, configs, blocks, head, take("prefix.embedding"), positions, turns, head_dim
    )
