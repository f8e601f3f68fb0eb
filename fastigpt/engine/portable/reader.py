"""What one model has read of a session's canvases: a row of a static cache for each, and a second cache for the
negative prefixes of guided ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastigpt.engine.portable.blocks import Blocks, Cache
from fastigpt.job import Request
from fastigpt.sampling import guide
from fastigpt.spec import ModelSpec

_WINDOW, _ROWS = 256, 16  # inputs and sequences of a prefill pass: they bound its activations


class Reader:
    """Row r is that of the session's row r. All inputs before a canvas's position but one are in the cache: the last is
    read by the pass that decides the position."""

    def __init__(self, blocks: Blocks, capacity: int) -> None:
        self.blocks, self.capacity = blocks, capacity
        self.prefixes = [_Prefixes(blocks, capacity)]  # the second when the first guided canvas comes
        self.guided = torch.zeros(capacity, dtype=torch.bool, device="cpu")

    def add(self, rows: Sequence[int], requests: Sequence[Request]) -> None:
        """Reads what is before the first unknown token of each."""
        self.guided[list(rows)] = torch.tensor([r.negative is not None for r in requests], device="cpu")
        self.prefixes[0].add([(row, request.prefix, request.tokens) for row, request in zip(rows, requests)])
        negative = [(row, r.negative, r.tokens) for row, r in zip(rows, requests) if r.negative is not None]
        if negative:
            if len(self.prefixes) == 1:
                self.prefixes.append(_Prefixes(self.blocks, self.capacity))
            self.prefixes[1].add(negative)

    def logits(self, tokens: torch.Tensor, position: torch.Tensor, rows: slice, scale: torch.Tensor) -> torch.Tensor:
        """float32 [B, W, n_tokens], guided where a canvas is: scores of positions first … first + W − 1.

        tokens: int64 [B, W], those before these positions; at position 0 the prefix's last element stands for it.
        position: int64 [B] on the CPU, the first ones. scale: float32 [B], of guidance.
        """
        found = self.prefixes[0].logits(tokens, position, rows)
        guided = self.guided[rows]
        if not bool(guided.any()):
            return found
        without = self.prefixes[1].logits(tokens, position, rows)
        mixed = guide(found, without, scale[:, None, None])
        return torch.where(guided.to(found.device)[:, None, None], mixed, found)

    def copy(self, sources: Sequence[int], targets: Sequence[int], positions: int | None = None) -> None:
        """Rows `sources` into rows `targets`; all are read before any is written. positions: as much as is needed to go
        on there; None: everything."""
        here, there = (torch.tensor(rows, device="cpu") for rows in (sources, targets))
        self.guided[there] = self.guided[here]
        for prefixes in self.prefixes:
            prefixes.copy(here, there, positions)

    def discard(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """What was read to score these positions was not finite. rows, positions: int64 [m] on the CPU."""
        for prefixes in self.prefixes:
            prefixes.overflowed = True
            prefixes.cache.clear(rows, prefixes.columns(rows, positions))


class _Prefixes:
    """A cache of sequences, each a prefix and the tokens of a canvas."""

    def __init__(self, blocks: Blocks, capacity: int) -> None:
        self.blocks, self.cache = blocks, Cache(blocks, capacity)
        self.length = torch.ones(capacity, dtype=torch.int64, device="cpu")  # of the prefixes
        self.last = torch.zeros(capacity, dtype=torch.int64, device=blocks.device)  # their last ids
        self.overflowed = False  # some of what is cached is not finite

    def add(self, sequences: Sequence[tuple[int, tuple[int, ...], torch.Tensor]]) -> None:
        """(row, prefix, tokens int64 [n_positions]) of canvases; equal ones are read once."""
        rows = [row for row, _, _ in sequences]
        if self.overflowed:
            self.cache.clear(torch.tensor(rows, device="cpu"))
        self.length[rows] = torch.tensor([len(prefix) for _, prefix, _ in sequences], device="cpu")
        self.last[rows] = torch.tensor([prefix[-1] for _, prefix, _ in sequences], device=self.last.device)
        equal: dict[tuple[int, ...], list[int]] = {}
        for row, prefix, tokens in sequences:
            unknown = (tokens < 0).nonzero()
            if len(unknown) > 0:  # else nothing will ever be drawn
                leading = (tokens[: int(unknown[0])] + self.blocks.spec.n_prefix_tokens).tolist()
                inputs = (len(prefix), *prefix, *leading)[:-1]
                equal.setdefault(inputs, []).append(row)
        ordered = sorted(equal.items(), key=lambda item: len(item[0]))
        for first in range(0, len(ordered), _ROWS):
            self._prefill(ordered[first : first + _ROWS])

    def _prefill(self, sequences: list[tuple[tuple[int, ...], list[int]]]) -> None:
        """(length of the prefix, *inputs) and the rows they belong to."""
        longest = len(sequences[-1][0]) - 1
        rows = torch.tensor([same[0] for _, same in sequences], device=self.blocks.device)
        # Shorter ones are padded: those columns are overwritten before anything looks at them.
        padded = [[*inputs[1:], *[0] * (longest + 1 - len(inputs))] for inputs, _ in sequences]
        ids = torch.tensor(padded, dtype=torch.int64, device=self.blocks.device)
        lengths = torch.tensor([inputs[0] for inputs, _ in sequences], device="cpu")
        for first in range(0, longest, _WINDOW):
            window = ids[:, first : first + _WINDOW]
            x = self.blocks.step(window, torch.full_like(lengths, first), lengths, self.cache, rows)
            self.overflowed |= not bool(torch.isfinite(x).all())
        for inputs, same in sequences:
            others = torch.tensor(same[1:], dtype=torch.int64, device=self.blocks.device)
            self.cache.copy(torch.full_like(others, same[0]), others, len(inputs) - 1)

    def columns(self, rows: torch.Tensor | slice, position: torch.Tensor) -> torch.Tensor:
        """Columns of the inputs that score these positions."""
        return (position + self.length[rows] - 1).clamp(max=self.blocks.spec.context)

    def logits(self, tokens: torch.Tensor, position: torch.Tensor, rows: slice) -> torch.Tensor:
        ids = tokens + self.blocks.spec.n_prefix_tokens
        ids[:, 0] = torch.where(position.to(ids.device) > 0, ids[:, 0], self.last[rows])
        first = self.columns(rows, position)
        return self.blocks.head(self.blocks.step(ids, first, self.length[rows], self.cache, rows))

    def copy(self, sources: torch.Tensor, targets: torch.Tensor, positions: int | None) -> None:
        if self.overflowed and positions is not None:
            self.cache.clear(targets)
        columns = None if positions is None else int(self.length[sources].max()) + positions
        self.length[targets] = self.length[sources]
        here, there = sources.to(self.last.device), targets.to(self.last.device)
        self.last[there] = self.last[here]
        self.cache.copy(here, there, columns)


class DraftReader(Reader):
    """Of a smaller model that guesses. One that has other prefixes guesses with the one that says nothing."""

    def __init__(self, blocks: Blocks, capacity: int, spec: ModelSpec) -> None:
        """spec: of the model it guesses for."""
        super().__init__(blocks, capacity)
        self._understands = _prefixes_of(blocks.spec) == _prefixes_of(spec)

    def add(self, rows: Sequence[int], requests: Sequence[Request]) -> None:
        if not self._understands:
            prefix = self.blocks.spec.unconditional
            requests = [replace(request, prefix=prefix, negative=None) for request in requests]
        super().add(rows, requests)


def _prefixes_of(spec: ModelSpec) -> tuple[int, int, tuple[int, ...]]:
    return spec.n_prefix_tokens, spec.prefix_length, spec.unconditional
