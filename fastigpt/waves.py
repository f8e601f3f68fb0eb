"""Runs a job of any size on an engine: in waves that fit memory, with a progress bar and row callbacks."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from tqdm import tqdm

from fastigpt.engine import Engine, Filled, Job, OnRow


@dataclass(frozen=True)
class Stats:
    """What a job took.

    seed: the seed it drew with. drawn: bool [n, height, width], True where a token was drawn. pass_starts: bool [n,
    height, width], True where a pass of the model began. passes: int64 [n], their sum. seconds: wall time, prefill
    included. waves: how many, one after another.
    """

    seed: int
    drawn: torch.Tensor
    pass_starts: torch.Tensor
    seconds: float
    waves: int

    @property
    def passes(self) -> torch.Tensor:
        return self.pass_starts.flatten(1).sum(1)

    @property
    def tokens_per_pass(self) -> float:
        """Drawn tokens that a pass decided, on average over all images."""
        return float(self.drawn.sum()) / max(1, int(self.pass_starts.sum()))

    @property
    def seconds_per_pass(self) -> float:
        """Of a wave's images together, prefill included."""
        return self.seconds / self.waves / max(1.0, float(self.passes.double().mean()))


def sources(tokens: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
    """int64 [n]: neighbours with the same prompt and the same leading known run share a number."""
    leading = (tokens >= 0).long().cumprod(1).bool()
    key = tokens.masked_fill(~leading, -1)
    if prompt is not None:
        key = torch.cat([prompt, key], 1)
    differs = torch.cat([torch.zeros(1, dtype=torch.bool, device="cpu"), (key[1:] != key[:-1]).any(1)])
    return differs.long().cumsum(0)


def run(
    engine: Engine, job: Job, *, batch_size: int | None, on_row: OnRow | None, progress: bool | None
) -> tuple[Filled, float, int]:
    """Fills a job of any size and returns it with the seconds and the waves it took. batch_size: images at a time;
    None: what fits the memory that is free. progress: None = a bar if a person is watching stderr."""
    count, height = len(job.tokens), engine.config.height
    largest = batch_size or engine.max_batch(job)
    waves = -(-count // largest)
    bounds = [count * i // waves for i in range(waves + 1)]
    show = sys.stderr.isatty() if progress is None else progress
    started = time.perf_counter()
    with tqdm(total=count * height, unit="row", disable=not show, leave=False) as bar:
        parts = []
        for first, last in pairwise(bounds):

            def report(images: range, row: int, tokens: torch.Tensor, first: int = first) -> None:
                bar.update(len(images))
                if on_row is not None:
                    on_row(range(images.start + first, images.stop + first), row, tokens)

            part = replace(
                job,
                tokens=job.tokens[first:last].contiguous(),
                index=job.index[first:last].contiguous(),
                source=job.source[first:last] - job.source[first],
                prompt=None if job.prompt is None else job.prompt[first:last].contiguous(),
            )
            parts.append(engine.fill(part, report if show or on_row is not None else None))
    tokens = torch.cat([part.tokens for part in parts])
    pass_starts = torch.cat([part.pass_starts for part in parts])
    return Filled(tokens, pass_starts), time.perf_counter() - started, waves
