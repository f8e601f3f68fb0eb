"""The one road of everything that draws: options are checked, canvases are handed to the engine a part at a time, and
what comes back is collected in the kind that was asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastigpt import waves
from fastigpt.arguments import prompt_ids, whole
from fastigpt.config import ImageGPTConfig
from fastigpt.engine import Engine, Filled, Job, OnRow
from fastigpt.options import Options, checked
from fastigpt.palette import Palette
from fastigpt.particles import CANDIDATE, MOST
from fastigpt.particles import run as run_particles
from fastigpt.parts import Repeated, parts
from fastigpt.progress import image_bar
from fastigpt.prompts import Vocabulary
from fastigpt.results import Results
from fastigpt.waves import Stats


class Fills(ABC):
    """Fills canvases; what it needs of a model for that, ImageGPT has."""

    config: ImageGPTConfig
    engine: Engine
    vocabulary: Vocabulary | None
    name: str

    @abstractmethod
    def known_cells(self, pictures: Any, *, rows: int | None = None, mask: Any = None) -> torch.Tensor: ...
    @abstractmethod
    def decode(self, tokens: Any) -> np.ndarray: ...
    @abstractmethod
    def _encode(self, pictures: list[Image.Image]) -> torch.Tensor: ...
    @abstractmethod
    def _palette(self) -> Palette: ...
    @abstractmethod
    def _named(self) -> AbstractContextManager[None]: ...
    @abstractmethod
    def _require_head(self) -> None: ...
    @abstractmethod
    def _check_overflow(self, tokens: torch.Tensor, words: torch.Tensor | None) -> None: ...
    @abstractmethod
    def _drafting(self, draft: Any) -> Engine: ...

    def _draw(
        self, canvases: Repeated, given: Any, kind: str, *, return_stats: bool, on_row: OnRow | None = None
    ) -> Any:
        """What `sample`, `complete` and `fill` do with canvases whose unknown tokens are −1. given: their options."""
        count, config = len(canvases), self.config
        self._require_head()
        if kind != "tokens":
            self._palette()
        particles = whole("particles", given.get("particles", 1), 1, MOST)
        options = checked(given, count, config)
        if particles > 1:
            whole("first_index", options.first_index, 0, CANDIDATE - count)  # above it the candidates have their noise
            if on_row is not None:
                raise ValueError("on_row was given with particles: rows of candidates are not final")
        jobs = self._jobs(canvases, options)
        seed, shape = options.drawing.seed, (count, config.height, config.width)
        results = Results(
            kind, count, config, self.decode, {"seed": str(seed), "model": self.name}, options.first_index
        )
        starts = torch.empty(shape if return_stats else (0,), dtype=torch.bool, device="cpu")
        seconds, n_waves = 0.0, 0
        with image_bar(count, given.get("progress"), config.height) as bar:
            for part, job in jobs:

                def report(some: range, row: int, tokens: torch.Tensor, first: int = part.start) -> None:
                    bar.rows(len(some), row)
                    if on_row is not None:
                        on_row(range(some.start + first, some.stop + first), row, tokens)

                watching = report if bar.shown or on_row is not None else None
                how = {"batch_size": options.batch_size}
                with self._named():
                    if particles == 1:
                        found = waves.run(self.engine, job, on_row=watching, **how)
                    else:
                        found = run_particles(self.engine, job, particles, on_rows=bar.rows, **how)
                filled = found[0]
                self._check_drawn(job, filled)
                results.add(part, filled.tokens)
                bar.images(part.stop)
                if return_stats:
                    starts[part.start : part.stop] = filled.pass_starts.view(-1, *shape[1:])
                seconds, n_waves = seconds + found[1], n_waves + found[2]
        if not return_stats:
            return results.value()
        drawn = (canvases.rows < 0).repeat_interleave(canvases.times, 0).view(shape)
        return results.value(), Stats(seed, drawn, starts, seconds, n_waves)

    def _jobs(self, canvases: Repeated, options: Options) -> Iterator[tuple[range, Job]]:
        """The canvases as jobs for the engine, a part at a time: which images, and their job. What can be wrong is told
        now."""
        words = self._words(options.prompt, canvases)
        draft = None if options.draft is None else self._drafting(options.draft)

        def make(images: range) -> Job:
            tokens, prompt = canvases.part(images), None if words is None else words.part(images)
            return Job(
                tokens=tokens,
                index=torch.arange(len(images), device="cpu") + (options.first_index + images.start),
                source=waves.sources(tokens, prompt),
                prompt=prompt,
                drawing=options.drawing,
                window=options.window,
                draft=draft,
            )

        return ((images, make(images)) for images in parts(len(canvases), options.batch_size))

    def _check_drawn(self, job: Job, filled: Filled) -> None:
        self._check_overflow(filled.tokens, job.prompt)
        if job.drawing.guidance_scale is not None:
            self._check_overflow(filled.tokens, None)

    def _words(self, prompt: str | Sequence[str] | None, canvases: Repeated) -> Repeated | None:
        """The ids of one prompt for all images, or of one for each canvas that was given."""
        if prompt is None:
            return None
        count = 1 if isinstance(prompt, str) else len(canvases.rows)
        ids = prompt_ids(prompt, count, self.vocabulary)
        assert ids is not None
        return Repeated(ids, len(canvases) // count)

    def _empty(self, n: int) -> Repeated:
        return Repeated(torch.tensor(-1, device="cpu").expand(n, self.config.n_pixels))
