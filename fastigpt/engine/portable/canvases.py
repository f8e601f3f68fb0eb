"""How far the canvases of a session are: tensors with a row for each, so that a pass advances all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastigpt.job import Filled, Request
from fastigpt.sampling import Drawing, Drawings
from fastigpt.spec import ModelSpec


class Canvases:
    """On the device, [rows, …]; on the CPU what decides which work is done, so that a pass waits for the device once.

    tokens: int64 [rows, n_positions + 1]: known and decided ones, guesses elsewhere. known, pass_starts: bool likewise.
    The last column takes what a window writes past the canvas. scored: one past the last position that was drawn,
    rightly or not. wrong: what the last decided token was taken for, if for another, else −1.
    On the CPU, [rows]: position, the next one to decide; target, where there is nothing more to do, for now: behind the
    last unknown token before the stop, and at the stop itself where known tokens are scored; log_likelihood, float64.
    """

    def __init__(self, spec: ModelSpec, rows: int, device: torch.device) -> None:
        self.n_positions, self.device = spec.n_positions, device

        def column(*shape: int, dtype: torch.dtype = torch.int64, on: torch.device | str = device) -> torch.Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=on)

        cells = self.n_positions + 1
        self.tokens, self.known = column(cells), column(cells, dtype=torch.bool)
        self.pass_starts = column(cells, dtype=torch.bool)
        self.index, self.scored, self.wrong = column(), column(), column()
        self.scores = column(dtype=torch.bool)  # whether known tokens are
        self.log_likelihood = column(dtype=torch.float64, on="cpu")  # not all devices have float64
        self.drawings = Drawings([Drawing()] * rows, device)
        self.position, self.target = column(on="cpu"), column(on="cpu")

    def put(self, rows: Sequence[int], requests: Sequence[Request]) -> None:
        """New canvases. Tokens before the first unknown one are decided."""
        row = torch.tensor(rows, device=self.device)
        tokens = torch.stack([request.tokens for request in requests])
        leading = (tokens >= 0).long().cumprod(1).sum(1)
        self.tokens[row, :-1] = tokens.clamp(min=0).to(self.device)
        self.known[row, :-1] = (tokens >= 0).to(self.device)
        self.pass_starts[row] = False
        self.index[row] = torch.tensor([request.index for request in requests], device=self.device)
        self.scored[row] = leading.to(self.device)
        self.wrong[row] = -1
        self.scores[row] = torch.tensor([request.score for request in requests], device=self.device)
        self.log_likelihood[rows] = 0
        self.drawings.put(row, Drawings([request.drawing for request in requests], self.device))
        self.position[rows] = leading
        for r, request in zip(rows, requests):
            self.target[r] = self.end(request)

    def end(self, request: Request) -> int:
        """Where there is nothing more to do for this request."""
        stop = self.n_positions if request.stop is None else request.stop
        if request.score:
            return stop
        unknown = (request.tokens[:stop] < 0).nonzero()
        return int(unknown[-1]) + 1 if len(unknown) > 0 else 0

    def active(self) -> torch.Tensor:
        """int64 [m], ascending: the rows with something to do."""
        return (self.position < self.target).nonzero().flatten()

    def inputs(self, rows: slice, position: torch.Tensor, width: int) -> torch.Tensor:
        """int64 [m, width]: the token before each position and the width − 1 from there. position: int64 [m], CPU."""
        place = position[:, None] + torch.arange(-1, width - 1, device="cpu")
        return self.tokens[rows].gather(1, place.clamp(0, self.n_positions).to(self.device))

    def guess(self, rows: slice, at: torch.Tensor, guesses: torch.Tensor) -> None:
        """Guesses int64 [m, k] for positions int64 [m, k]; known tokens stay."""
        tokens, known = self.tokens[rows], self.known[rows]
        tokens.scatter_(1, at, torch.where(known.gather(1, at), tokens.gather(1, at), guesses))

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Rows `sources` into rows `targets`; all are read before any is written."""
        here, there = (torch.tensor(rows, device=self.device) for rows in (sources, targets))
        for column in vars(self).values():
            if isinstance(column, Drawings):
                column.put(there, column.rows(here))
            elif isinstance(column, torch.Tensor):
                column[there.to(column.device)] = column[here.to(column.device)]

    def filled(self, rows: Sequence[int]) -> Filled:
        row = torch.tensor(rows, device=self.device)
        decided = torch.arange(self.n_positions, device=self.device) < self.position[rows].to(self.device)[:, None]
        known = self.known[row, :-1]
        tokens = self.tokens[row, :-1].masked_fill(~(decided | known), -1)
        return Filled(tokens.cpu(), self.pass_starts[row, :-1].cpu(), self.log_likelihood[rows])
