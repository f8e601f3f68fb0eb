"""Whole sequences: scoring known tokens, and prefilling what is known before the first unknown one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from fastigpt.engine.triton.block import Work, run_block
from fastigpt.engine.triton.cache import Cache
from fastigpt.engine.triton.weights import Model
from fastigpt.kernels.causal_attention import causal_attention

SEQUENCE_ROWS = 32768  # tokens that are scored or prefilled at once: bounds the activations


class _Whole:
    """Attention of sequences [batch, length] to themselves, whose first inputs stand in row `first` of the position
    table; if there is a cache, their keys and values go there."""

    def __init__(
        self, model: Model, batch: int, length: int, first: int, cache: Cache | None, lanes: torch.Tensor | None
    ) -> None:
        self.model, self.batch, self.cache, self.lanes = model, batch, cache, lanes
        begin = torch.zeros(1, dtype=torch.int32, device=model.device)
        self.turns = model.turns_at(first, begin, length)

    def projection(self, i: int) -> dict[str, Any]:
        return {"turns": self.turns}

    def attend(self, i: int, qkv: torch.Tensor, out: torch.Tensor) -> bool:
        q, k, v = self.model.split(qkv, self.batch)
        if self.cache is not None:
            assert self.lanes is not None
            self.cache.append(i, k, v, self.lanes)
            if i == self.model.spec.n_layer - 1:
                return False  # nobody reads what comes after the last keys
        causal_attention(q, k, v, configs=self.model.configs, scale=self.model.scale, out=out.view(q.shape))
        return True


def embed(model: Model, tokens: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """float32 [B, L + T − 1, width]: the prefix, then x₀ … x_{T−2}. tokens: [B, T], prefix: [B, L], on the device."""
    x = torch.cat([model.prefix_embedding[prefix], model.head.wte[tokens[:, :-1]]], 1).float()
    if model.positions is None:
        return x
    first = model.spec.position_row(0, prefix.shape[1])
    return x + model.positions[first : first + x.shape[1]].float()


def _run(
    model: Model,
    x: torch.Tensor,
    n_prefix: int,
    n_layer: int,
    cache: Cache | None = None,
    lanes: torch.Tensor | None = None,
) -> None:
    """x [B, T, width], which begins with n_prefix elements of a prefix, through `n_layer` blocks, in place."""
    rows = x.view(-1, x.shape[-1])
    first = model.spec.position_row(0, n_prefix)
    # What goes into a cache is what tokens are drawn from.
    work = Work.empty(model, len(rows), exact=cache is not None)
    attention = _Whole(model, len(x), x.shape[1], first, cache, lanes)
    for i in range(n_layer):
        run_block(model, i, rows, work, attention)


def score(model: Model, tokens: torch.Tensor, prefix: torch.Tensor, n_layer: int) -> torch.Tensor:
    """Hidden states float32 [B, T, width] after `n_layer` blocks at the inputs that score x₀ … x_{T−1}."""
    length = tokens.shape[1]
    at_once = max(1, SEQUENCE_ROWS // (prefix.shape[1] + length))
    parts = []
    for first in range(0, len(tokens), at_once):
        some = slice(first, first + at_once)
        x = embed(model, tokens[some].to(model.device), prefix[some].to(model.device))
        _run(model, x, prefix.shape[1], n_layer)
        parts.append(x[:, x.shape[1] - length :])
    return torch.cat(parts).contiguous()


@dataclass(frozen=True)
class Known:
    """What is known of a canvas before its first unknown token: prefix, and int64 [known] on the CPU."""

    prefix: tuple[int, ...]
    tokens: torch.Tensor

    @property
    def slots(self) -> int:
        """Inputs that are read before the one that scores the first unknown token."""
        return len(self.prefix) + len(self.tokens) - 1

    @property
    def key(self) -> tuple[tuple[int, ...], bytes]:
        return self.prefix, self.tokens.numpy().tobytes()


def prefill(model: Model, cache: Cache, sequences: Sequence[tuple[int, Known]]) -> None:
    """Keys and values of each sequence's `slots` inputs into slots 0 … of its lane. What comes after them there means
    nothing."""

    def length(sequence: tuple[int, Known]) -> tuple[int, int]:
        return len(sequence[1].prefix), len(sequence[1].tokens)

    for n_prefix, group in groupby(sorted(sequences, key=length), lambda sequence: len(sequence[1].prefix)):
        alike = list(group)
        while alike:  # the longest last, so that few are padded by much
            longest = max(1, alike[-1][1].slots)
            some, alike = alike[-max(1, SEQUENCE_ROWS // longest) :], alike[: -max(1, SEQUENCE_ROWS // longest)]
            # Shorter ones are padded: a slot is written again before anything looks at it, or lengths hide it.
            tokens = torch.zeros(len(some), max(1, longest + 1 - n_prefix), dtype=torch.int64, device="cpu")
            for row, (_, known) in zip(tokens, some):
                row[: len(known.tokens)] = known.tokens
            prefix = torch.tensor([known.prefix for _, known in some], device=model.device)
            x = embed(model, tokens.to(model.device), prefix)[:, :longest].contiguous()
            lanes = torch.tensor([lane for lane, _ in some], dtype=torch.int32, device=model.device)
            _run(model, x, n_prefix, model.spec.n_layer, cache, lanes)
