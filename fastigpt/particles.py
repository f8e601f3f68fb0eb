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

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from fastigpt import waves
from fastigpt.engine import Engine, Filled, Job
from fastigpt.sampling import guide, noise_bits

CANDIDATE = 2**48
"""Candidate c of the result with image index i draws with the noise of image index i + c · CANDIDATE."""
MOST = 2**15
_RESAMPLING = 2**31  # + row: the position whose noise resamples after that row; no canvas has as many cells
_SCORED_CELLS = 2**14  # at a time


def run(
    engine: Engine, job: Job, particles: int, *, batch_size: int | None, on_rows: Callable[[int, int], None]
) -> tuple[Filled, float, int]:
    """Fills a job with `particles` candidates per result (1 to MOST; image indices below CANDIDATE) and returns it with
    the seconds and the waves it took. on_rows(images, row) is called with how many images have finished a row.
    pass_starts are those of the candidate that was picked, and of its ancestors.

    The stretches that are weighted run from a row with unknown cells up to the next such row. Where the effective
    sample size 1/Σw² is then below half of the candidates they are resampled systematically. At the last known cell one
    is picked by its weight and draws what is left alone; a result without known cells after its first unknown one is
    therefore that of plain forcing. The uniform of (seed, image index, row) comes from the first word of position
    2³¹ + row of that image; the pick's row is the canvas's height.

    Nothing is kept between rows: each stretch prefills what is before it again, once to draw and once to weigh.
    """
    if job.drawing.temperature == 0:  # all candidates would be the same
        return waves.run(
            engine, job, batch_size=batch_size, on_row=lambda images, row, tokens: on_rows(len(images), row)
        )
    started = time.perf_counter()
    limit = batch_size or engine.max_batch(job)
    step = max(1, limit // particles)
    parts = []
    for first in range(0, len(job.tokens), step):
        part = _Candidates(engine, _part(job, slice(first, first + step)), particles, limit)
        for row in range(engine.config.height):
            part.draw(row)
            on_rows(len(part.job.tokens), row)
        parts.append(part.finish())
    filled = Filled(torch.cat([part.tokens for part in parts]), torch.cat([part.pass_starts for part in parts]))
    return filled, time.perf_counter() - started, len(parts)


def effective_sample_size(weights: torch.Tensor) -> torch.Tensor:
    """[...] from normalised weights [..., k]: 1/Σw², between 1 and k."""
    return 1 / weights.square().sum(-1)


def systematic(weights: torch.Tensor, uniform: torch.Tensor, count: int) -> torch.Tensor:
    """int64 [..., count], ascending: which of k candidates the points (j + u)/count fall on, each candidate taking up
    its weight. weights: float64 [..., k], sum 1. uniform: float64 [...], in (0, 1)."""
    edges = weights.cumsum(-1)
    points = (torch.arange(count, dtype=torch.float64, device="cpu") + uniform[..., None]) / count
    return torch.searchsorted(edges / edges[..., -1:], points)


class _Candidates:
    """The candidates of some results: tokens [n, k, n_pixels], all rows up to the last drawn one known."""

    def __init__(self, engine: Engine, job: Job, k: int, limit: int) -> None:
        config = engine.config
        self.engine, self.job, self.k, self.limit = engine, job, k, limit
        known = job.tokens >= 0
        self.evidence = known & ((~known).cumsum(1) > 0)  # known cells after an unknown one
        # ahead: known cells that come after this one; in_row: rows in which an unknown cell has such a cell ahead.
        ahead = self.evidence.flip(1).cumsum(1).flip(1) > 0
        by_row = (len(known), config.height, config.width)
        self.unknown_rows = (~known).view(by_row).any(2)
        self.weighted_rows = (~known & ahead).view(by_row).any(2)
        self.index = job.index[:, None] + torch.arange(k, device="cpu") * CANDIDATE
        self.tokens = job.tokens[:, None].repeat(1, k, 1)
        self.pass_starts = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.log_weights = torch.zeros(len(known), k, dtype=torch.float64, device="cpu")

    def draw(self, row: int) -> None:
        """Draws a row, weighs the candidates by the known cells up to the next row with unknown ones, resamples."""
        active = self.weighted_rows[:, row].nonzero().flatten()
        if len(active) == 0:
            return
        self._fill(active, row)
        later = torch.nn.functional.pad(self.unknown_rows[active, row + 1 :], (0, 1), value=True)
        ends = row + 1 + later.long().argmax(1)  # the first row with unknown cells, or the end of the canvas
        for end in ends.unique().tolist():
            which = active[ends == end]
            self.log_weights[which] += self._scores(which, row, end)
        self._resample(active[self.weighted_rows[active, row + 1 :].any(1)], row)

    def _fill(self, active: torch.Tensor, row: int) -> None:
        width = self.engine.config.width
        stop = (row + 1) * width
        tokens = self.tokens[active].flatten(0, 1)
        tokens[:, stop:] = 0  # known, whatever it is: the engine ends after this row
        prompt = None if self.job.prompt is None else self.job.prompt[active].repeat_interleave(self.k, 0)
        job = replace(
            self.job,
            tokens=tokens,
            index=self.index[active].flatten(),
            source=waves.sources(tokens, prompt),
            prompt=prompt,
        )
        filled, *_ = waves.run(self.engine, job, batch_size=self.limit, on_row=None)
        self.tokens[active, :, :stop] = filled.tokens[:, :stop].view(len(active), self.k, stop)
        self.pass_starts[active] |= filled.pass_starts.view(len(active), self.k, -1)

    def _scores(self, which: torch.Tensor, row: int, end: int) -> torch.Tensor:
        """float64 [len(which), k]: log-probability of the known cells in rows `row` … `end` − 1 that follow an unknown
        one, in nats."""
        first, stop = row * self.engine.config.width, end * self.engine.config.width
        tokens = self.tokens[which, :, :stop].flatten(0, 1)
        counts = self.evidence[which, first:stop].repeat_interleave(self.k, 0)
        prompt = None if self.job.prompt is None else self.job.prompt[which].repeat_interleave(self.k, 0)
        scale = self.job.drawing.guidance_scale
        sums = []
        for batch in torch.arange(len(tokens), device="cpu").split(max(1, _SCORED_CELLS // stop)):
            given = tokens[batch]
            logits = self.engine.logits(given, None if prompt is None else prompt[batch])[:, first:]
            if scale is not None:
                logits = guide(logits, self.engine.logits(given)[:, first:], scale)
            nats = logits.cpu().double().log_softmax(-1).gather(2, given[:, first:, None])[..., 0]
            sums.append((nats * counts[batch]).sum(1))
        return torch.cat(sums).view(len(which), self.k)

    def _resample(self, which: torch.Tensor, row: int) -> None:
        weights = self.log_weights[which].softmax(1)
        poor = effective_sample_size(weights) < self.k / 2
        which = which[poor]
        if len(which) == 0:
            return
        ancestors = systematic(weights[poor], self._uniform(which, row), self.k)
        self.tokens[which] = self.tokens[which[:, None], ancestors]
        self.pass_starts[which] = self.pass_starts[which[:, None], ancestors]
        self.log_weights[which] = 0

    def _uniform(self, which: torch.Tensor, row: int) -> torch.Tensor:
        bits = noise_bits(
            self.job.drawing.seed, self.job.index[which], torch.tensor(_RESAMPLING + row, device="cpu"), 1
        )[:, 0]
        return ((bits >> 8).double() + 0.5) * 2.0**-24

    def finish(self) -> Filled:
        """Picks one candidate of each result by its weight; it draws what is left."""
        every = torch.arange(len(self.tokens), device="cpu")
        weights = self.log_weights.softmax(1)
        picked = systematic(weights, self._uniform(every, self.engine.config.height), 1)[:, 0]
        picked[~self.weighted_rows.any(1)] = 0
        tokens = self.tokens[every, picked]
        job = replace(
            self.job,
            tokens=tokens,
            index=self.index[every, picked],
            source=waves.sources(tokens, self.job.prompt),
        )
        filled, *_ = waves.run(self.engine, job, batch_size=self.limit, on_row=None)
        return Filled(filled.tokens, filled.pass_starts | self.pass_starts[every, picked])


def _part(job: Job, some: slice) -> Job:
    return replace(
        job,
        tokens=job.tokens[some],
        index=job.index[some],
        source=job.source[some] - job.source[some][0],
        prompt=None if job.prompt is None else job.prompt[some],
    )
