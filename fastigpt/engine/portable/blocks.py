"""The formula of the model in plain PyTorch, over a static cache or over whole sequences."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from fastigpt.engine.arithmetic import converted
from fastigpt.formulas import gated_silu, quick_gelu, rotate
from fastigpt.spec import ROTARY, ModelSpec


class Cache:
    """Keys and values of every layer in one allocation: [layers, rows, columns, n_kv_head, head_dim].

    Column c of a row holds the c-th input of its sequence. The last column, one more than any sequence has, takes what
    windows write past the end; no input that counts looks at it.
    """

    def __init__(self, blocks: Blocks, rows: int, columns: int | None = None) -> None:
        spec, block = blocks.spec, blocks.spec.block
        shape = (2, spec.n_layer, rows, columns or spec.context + 1, block.n_kv_head, block.head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=blocks.dtype, device=blocks.device)

    def copy(self, sources: torch.Tensor, targets: torch.Tensor, columns: int | None = None) -> None:
        """The first columns (None: all) of rows `sources` into rows `targets`; all are read before any is written."""
        for layer in (*self.keys, *self.values):
            layer[targets, :columns] = layer[sources, :columns]

    def clear(self, rows: torch.Tensor, columns: torch.Tensor | slice = slice(None)) -> None:
        """Zeros there. A masked key has no weight, but zero times what is not a number is not a number."""
        self.keys[:, rows, columns] = 0
        self.values[:, rows, columns] = 0


class Blocks:
    """A model's weights on a device, in one dtype, and what they compute.

    Inputs are ids of the prefix as they are, and tokens of the canvas `n_prefix_tokens` higher.
    """

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.spec, self.device, self.dtype = spec, device, dtype
        self.weights = {
            name: converted(name, w, device, torch.float32 if name == ROTARY else dtype).contiguous()
            for name, w in weights.items()
        }

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., width] without positions."""
        token = ids - self.spec.n_prefix_tokens
        x = self.weights["token.embedding"][token.clamp(min=0)]
        prefix = self.weights["prefix.embedding"][ids.clamp(max=self.spec.n_prefix_tokens - 1)]
        return torch.where(token[..., None] < 0, prefix, x)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name], self.spec.block.norm_epsilon)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., n_tokens] from hidden states [..., width]."""
        x = self.norm(x, "norm")
        if self.spec.head_inner is not None:
            x = F.gelu(self.linear(x, "head.fc"))
        return self.linear(x, "head").float()

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        h = self.linear(x, name + ".fc")
        h = quick_gelu(h) if self.spec.block.mlp == "quick_gelu" else gated_silu(h)
        return self.linear(h, name + ".out")

    def step(
        self,
        ids: torch.Tensor,
        first: torch.Tensor,
        prefix_length: torch.Tensor,
        cache: Cache | None = None,
        rows: slice | torch.Tensor = slice(None),
        n_layer: int | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, W, width] after n_layer blocks (None: all) of a window of inputs for each sequence.

        ids: int64 [B, W], inputs. first, prefix_length: int64 [B] on the CPU, the column where the
        window begins and the length of the sequence's prefix. rows: those of the cache that hold the sequences; what
        is before `first` is read from there, and the windows are written there. cache=None: the windows are the whole
        sequences, and nothing is kept.
        """
        block, width = self.spec.block, ids.shape[1]
        columns = first.to(self.device)[:, None] + torch.arange(width, device=self.device)
        place = columns + (self.spec.prefix_length - prefix_length).to(self.device)[:, None]
        place = place.clamp(max=self.spec.context - 1)
        x, turns, mask = self.embed(ids), None, None
        if self.spec.positions == "learned":
            x = x + self.weights["positions"][place]
        else:
            turns = self.weights[ROTARY][place][:, :, None]  # [B, W, 1, head_dim / 2, 2]
        if cache is not None:
            # A sequence may look at columns up to its own; those beyond hold nothing yet, or stale guesses.
            last = cache.keys.shape[2] - 1
            end = min(int(first.max()) + width, last + 1)
            mask = (torch.arange(end, device=self.device) <= columns[..., None])[:, None]  # [B, 1, W, end]
            row = torch.arange(cache.keys.shape[1], device=self.device)[rows, None]
            column = columns.clamp(max=last)
        for i in range(self.spec.n_layer if n_layer is None else n_layer):
            name = f"blocks.{i}"
            qkv = self.linear(self.norm(x, name + ".norm_1"), name + ".qkv")
            q, k, v = (part.unflatten(-1, (-1, block.head_dim)) for part in qkv.split(block.sections, -1))
            if turns is not None:
                q, k = (rotate(part.float(), turns).to(part.dtype) for part in (q, k))
            if cache is not None:
                keys, values = cache.keys[i], cache.values[i]
                keys[row, column] = k
                values[row, column] = v
                k, v = keys[rows, :end], values[rows, :end]
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=cache is None,
                enable_gqa=block.n_kv_head < block.n_head,
            )  # fmt: skip
            x = x + self.linear(y.transpose(1, 2).flatten(2), name + ".proj")
            x = x + self.mlp(self.norm(x, name + ".norm_2"), name)
        return x
