"""Runs a job of any size on an engine: in waves that fit memory, with row callbacks."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from fastigpt.engine import Engine, Filled, Job, OnRow


@dataclass(frozen=True, repr=False)
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

    @property
    def images_per_second(self) -> float:
        return len(self.drawn) / self.seconds

    def __repr__(self) -> str:
        n, passes = len(self.drawn), float(self.passes.double().mean())
        return (
            f"Stats(seed {self.seed}: {n} image{'' if n == 1 else 's'} in {self.seconds:.3g} s, "
            f"{self.images_per_second:.3g} images/s; {passes:.0f} passes per image, "
            f"{self.tokens_per_pass:.1f} tokens and {1e3 * self.seconds_per_pass:.3g} ms each)"
        )


def sources(tokens: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
    """int64 [n]: neighbours with the same prompt and the same leading known run share a number."""
    leading = (tokens >= 0).long().cumprod(1).bool()
    key = tokens.masked_fill(~leading, -1)
    if prompt is not None:
        key = torch.cat([prompt, key], 1)
    differs = torch.cat([torch.zeros(1, dtype=torch.bool, device="cpu"), (key[1:] != key[:-1]).any(1)])
    return differs.long().cumsum(0)


def run(engine: Engine, job: Job, *, batch_size: int | None, on_row: OnRow | None) -> tuple[Filled, float, int]:
    """Fills a job of any size and returns it with the seconds and the waves it took. batch_size: images at a time;
    None: what fits the memory that is free."""
    count = len(job.tokens)
    largest = batch_size or engine.max_batch(job)
    waves = -(-count // largest)
    bounds = [count * i // waves for i in range(waves + 1)]
    started = time.perf_counter()
    parts = []
    for first, last in pairwise(bounds):

        def report(images: range, row: int, tokens: torch.Tensor, first: int = first) -> None:
            assert on_row is not None
            on_row(range(images.start + first, images.stop + first), row, tokens)

        part = replace(
            job,
            tokens=job.tokens[first:last].contiguous(),
            index=job.index[first:last].contiguous(),
            source=job.source[first:last] - job.source[first],
            prompt=None if job.prompt is None else job.prompt[first:last].contiguous(),
        )
        parts.append(engine.fill(part, None if on_row is None else report))
    tokens = torch.cat([part.tokens for part in parts])
    pass_starts = torch.cat([part.pass_starts for part in parts])
    return Filled(tokens, pass_starts), time.perf_counter() - started, waves
