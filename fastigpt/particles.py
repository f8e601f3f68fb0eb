"""Masks with known cells after the hole: sequential Monte Carlo, so that what comes later matters too.

Plain forcing draws each unknown cell from what is before it and cannot know what follows. Here k candidates per result
are drawn side by side and resampled by how well they predict the known cells to come (Gordon, Salmond and Smith, "Novel
approach to nonlinear/non-Gaussian Bayesian state estimation", 1993; Doucet and Johansen, "A tutorial on particle
filtering and smoothing", 2009).

With q the distribution that is drawn from (guided, at the drawing's temperature, filtered) and p the model's own
(guided, at temperature 1, unfiltered, so that no known cell is impossible), unknown cells U and known cells K:

    target      π(x_U)  ∝  Π_{i in U} q(x_i | x_<i) · Π_{i in K} p(x_i | x_<i)
    proposal             Π_{i in U} q(x_i | x_<i)                                  (plain forcing)
    weight of a stretch  Π_{i in K, in the stretch} p(x_i | x_<i)

Drawn with q = p (temperature 1, no filter) that target is exactly the model's p(x_U | x_K); it is reached as k grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

import torch

from fastigpt.engine import Engine, Session, Window, loop
from fastigpt.job import Filled, Request
from fastigpt.sampling import noise_bits

CANDIDATE = 2**48
"""Candidate c of the result with image index i draws with the noise of image index i + c · CANDIDATE."""
MOST = 2**15
_RESAMPLING = 2**31  # + row: the position whose noise resamples after that row; no canvas has as many cells


def run(
    engine: Engine,
    requests: Sequence[Request],
    particles: int,
    *,
    batch_size: int | None = None,
    window: Window = "auto",
    draft: Engine | None = None,
    on_done: Callable[[int], None] | None = None,
) -> tuple[Filled, int]:
    """Draws canvases with `particles` candidates each (1 to MOST; image indices below CANDIDATE) and returns them, and
    how many results were drawn side by side at most. pass_starts are those of the candidate that was picked, and of its
    ancestors. batch_size counts candidates; those of one result always run together.

    The stretches that are weighted run from a row with unknown cells up to the next such row. Where the effective
    sample size 1/Σw² is then below half of the candidates they are resampled systematically. At the last known cell one
    is picked by its weight and draws what is left alone; a result without known cells after its first unknown one is
    therefore that of plain forcing. The uniform of (seed, image index, row) comes from the first word of position
    2³¹ + row of that image; the pick's row is the canvas's height.
    """
    if particles == 1:
        return loop.run(engine, requests, batch_size=batch_size, window=window, draft=draft, on_done=on_done)
    capacity = loop.slots_for(engine, requests, batch_size=batch_size, window=window, draft=draft, of_each=particles)
    at_once = capacity // particles
    with closing(engine.open(capacity, window=window, draft=draft)) as session:
        results = _Results(engine, session, requests, particles)
        loop.drive(session, results, len(requests), at_once, on_done)
    return results.found, at_once


class _Results:
    """What the loop draws: results, with slots for the candidates of each."""

    def __init__(self, engine: Engine, session: Session, requests: Sequence[Request], k: int) -> None:
        self.engine, self.session, self.requests, self.k = engine, session, requests, k
        self.found = loop.empty(len(requests), engine)
        self.running: dict[int, _Result] = {}

    def start(self, images: list[int]) -> None:
        for image in images:
            self.running[image] = _Result(self.engine, self.session, self.requests[image], self.k)

    def advance(self, decided: dict[int, int]) -> int:
        done = 0
        for image, result in list(self.running.items()):
            if result.reached(decided) and (canvas := result.go_on()) is not None:
                loop.keep(canvas, self.found, [image])
                del self.running[image]
                done += 1
        return done


def effective_sample_size(weights: torch.Tensor) -> torch.Tensor:
    """[...] from normalised weights [..., k]: 1/Σw², between 1 and k."""
    return 1 / weights.square().sum(-1)


def systematic(weights: torch.Tensor, uniform: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [..., count], ascending: which of k candidates the points (j + u)/count fall on, each candidate taking up
    its weight. weights: float64 [..., k], sum 1. uniform: float64 [...], in (0, 1)."""
    edges = weights.cumsum(-1)
    points = (torch.arange(count, dtype=torch.float64, device="cpu") + uniform[..., None]) / count
    return torch.searchsorted(edges / edges[..., -1:], points)


class _Result:
    """The candidates of one result, side by side in a session."""

    def __init__(self, engine: Engine, session: Session, request: Request, k: int) -> None:
        self.session, self.request, self.height = session, request, engine.spec.height
        self.end = engine.spec.n_positions
        self.stretches = _stretches(request.tokens, engine.spec.height, engine.spec.columns)
        # At temperature 0 all candidates would be the same.
        if not self.stretches or request.drawing.temperature == 0:
            self.stretches, k = [], 1
        self.indices = [request.index + c * CANDIDATE for c in range(k)]
        self.stop = self.stretches[0][1] if self.stretches else self.end
        scored = bool(self.stretches)
        self.slots = session.add([replace(request, index=i, stop=self.stop, score=scored) for i in self.indices])
        self.before = torch.zeros(
            k, dtype=torch.float64, device="cpu"
        )  # log-likelihood that the weights don't count any more
        self.picked = not self.stretches

    def reached(self, decided: dict[int, int]) -> bool:
        return all(decided[slot] >= self.stop for slot in self.slots)

    def go_on(self) -> Filled | None:
        """Weighs the candidates and sends them on; the canvas, once there is nothing left to draw."""
        if self.picked:
            canvas = self.session.read(self.slots)
            self.session.remove(self.slots[0])
            return canvas
        likelihood = self.session.read(self.slots).log_likelihood
        weights = (likelihood - self.before).softmax(0)
        row, _ = self.stretches.pop(0)
        if not self.stretches:
            self._pick(int(systematic(weights, self._uniform(self.height), 1)))
        else:
            self.stop = self.stretches[0][1]
            if effective_sample_size(weights) < len(self.slots) / 2:
                self._resample(systematic(weights, self._uniform(row), len(self.slots)), likelihood)
        for slot in self.slots:
            self.session.resume(slot, self.stop)
        return None

    def _pick(self, which: int) -> None:
        for slot in self.slots[:which] + self.slots[which + 1 :]:
            self.session.remove(slot)
        self.slots, self.stop, self.picked = [self.slots[which]], self.end, True

    def _resample(self, ancestors: torch.Tensor, likelihood: torch.Tensor) -> None:
        """Candidate c goes on from what candidate ancestors[c] has drawn, with its own noise."""
        for dead in set(range(len(self.slots))) - set(ancestors.tolist()):
            self.session.remove(self.slots[dead])
        slots = list(self.slots)
        for ancestor in ancestors.unique().tolist():
            heirs = (ancestors == ancestor).nonzero().flatten().tolist()
            forked = self.session.fork(self.slots[ancestor], [self.indices[c] for c in heirs])
            for c, slot in zip(heirs, forked):
                slots[c] = slot
        self.slots, self.before = slots, likelihood[ancestors]

    def _uniform(self, row: int) -> torch.Tensor:
        index, position = (torch.tensor(x, device="cpu") for x in (self.request.index, _RESAMPLING + row))
        bits = noise_bits(self.request.drawing.seed, index, position, 1)[0]
        return ((bits >> 8).double() + 0.5) * 2.0**-24


def _stretches(tokens: torch.Tensor, height: int, columns: int) -> list[tuple[int, int]]:
    """(row, end) of every stretch that is weighted: a row with an unknown cell that has a known one somewhere behind
    it, and the first cell of the next row with unknown cells, or the end of the canvas."""
    unknown = (tokens < 0).view(height, columns)
    ahead = (tokens >= 0).flip(0).cumsum(0).flip(0) > 0  # a known cell here or behind
    rows = unknown.any(1).nonzero().flatten().tolist()
    weighted = (unknown & ahead.view(height, columns)).any(1)
    ends = [*rows[1:], height]
    return [(row, end * columns) for row, end in zip(rows, ends) if weighted[row]]
