"""The one road of everything that draws: options are checked, canvases are handed to the engine a part at a time, and
what comes back is collected in the kind that was asked for."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image

from fastigpt.arguments import flag, prompt_ids, whole
from fastigpt.config import ImageGPTConfig
from fastigpt.engine import Engine, loop
from fastigpt.engine.loop import OnRow
from fastigpt.families import image_gpt
from fastigpt.job import Filled, Request, Stats
from fastigpt.options import DrawOptions, Options, checked
from fastigpt.palette import Palette
from fastigpt.particles import CANDIDATE, MOST
from fastigpt.particles import run as run_particles
from fastigpt.parts import Repeated, parts
from fastigpt.progress import image_bar
from fastigpt.prompts import Vocabulary
from fastigpt.results import Results


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
    def _check_overflow(self, tokens: torch.Tensor, prefix: torch.Tensor | None) -> None: ...
    @abstractmethod
    def _drafting(self, draft: Any) -> Engine: ...

    def _draw(
        self,
        canvases: Repeated,
        given: Any,
        kind: str,
        *,
        return_stats: bool,
        on_row: OnRow | None = None,
        stop: int | None = None,
    ) -> Any:
        """What `sample`, `complete` and `fill` do with canvases whose unknown tokens are −1. given: their options.
        stop: tokens from there on are left as they are."""
        count, config = len(canvases), self.config
        return_stats = flag("return_stats", return_stats)
        progress = None if given.get("progress") is None else flag("progress", given["progress"])
        if kind != "tokens":
            self._palette()
        particles = whole("particles", given.get("particles", 1), 1, MOST)
        options = checked(given, count, config)
        if particles > 1:
            whole("first_index", options.first_index, 0, CANDIDATE - count)  # above it the candidates have their noise
            if on_row is not None:
                raise ValueError("on_row was given with particles: rows of candidates are not final")
        parts_of_job = self._requests(canvases, options, stop)
        seed, shape = options.drawing.seed, (count, config.height, config.width)
        results = Results(
            kind, count, config, self.decode, {"seed": str(seed), "model": self.name}, options.first_index
        )
        starts = torch.empty(shape if return_stats else (0,), dtype=torch.bool, device="cpu")
        how = self._how(options)
        seconds, together = 0.0, 1
        with image_bar(count, progress, config.height) as bar:
            for part, requests in parts_of_job:

                def report(some: range, row: int, tokens: torch.Tensor, first: int = part.start) -> None:
                    bar.rows(len(some), row)
                    if on_row is not None:
                        on_row(range(some.start + first, some.stop + first), row, tokens)

                watching = report if bar.shown or on_row is not None else None
                started = time.perf_counter()
                with self._named():
                    if particles == 1:
                        filled, batch = loop.run(self.engine, requests, on_row=watching, **how)
                    else:
                        filled, batch = run_particles(self.engine, requests, particles, **how)
                seconds, together = seconds + time.perf_counter() - started, max(together, batch)
                self._check_drawn(requests, filled)
                results.add(part, filled.tokens)
                bar.images(part.stop)
                if return_stats:
                    starts[part.start : part.stop] = filled.pass_starts.view(-1, *shape[1:])
        if not return_stats:
            return results.value()
        drawn = (canvases.rows < 0).repeat_interleave(canvases.times, 0).view(shape)
        return results.value(), Stats(seed, drawn, starts, seconds, together)

    def _requests(
        self, canvases: Repeated, options: Options, stop: int | None = None
    ) -> Iterator[tuple[range, list[Request]]]:
        """The canvases as requests, a part at a time: which images, and their requests. What can be wrong is told
        now."""
        self._require_head()
        words, config = self._words(options.prompt, canvases), self.config
        negative = None if options.drawing.guidance_scale is None else image_gpt.prefix(config)

        def make(images: range) -> list[Request]:
            prompts = [()] * len(images) if words is None else words.part(images).tolist()
            return [
                Request(tokens, options.first_index + k, options.drawing, image_gpt.prefix(config, ids), negative, stop)
                for k, tokens, ids in zip(images, canvases.part(images), prompts)
            ]

        return ((images, make(images)) for images in parts(len(canvases), options.batch_size))

    def _how(self, options: Options) -> dict[str, Any]:
        """What engine/loop.py takes besides requests."""
        draft = None if options.draft is None else self._drafting(options.draft)
        return {"batch_size": options.batch_size, "window": options.window, "draft": draft}

    def _check_drawn(self, requests: Sequence[Request], filled: Filled) -> None:
        tokens = filled.tokens[:, : requests[0].stop]
        self._check_overflow(tokens, torch.tensor([request.prefix for request in requests], device="cpu"))
        if requests[0].negative is not None:
            self._check_overflow(tokens, torch.tensor([request.negative for request in requests], device="cpu"))

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

    def requests(
        self, tokens: torch.Tensor, *, negative_prompt: str | None = None, **options: Unpack[DrawOptions]
    ) -> list[Request]:
        """What an engine is asked for canvases int64 [n, n_positions], −1 = draw, with one set of options: for those
        who run a session of their own, such as a server."""
        choice = checked(options, len(tokens), self.config)
        found = [request for _, part in self._requests(Repeated(tokens), choice) for request in part]
        if negative_prompt is None:
            return found
        if choice.drawing.guidance_scale is None:
            raise ValueError("negative_prompt was given without a guidance_scale to lead away from it")
        ids = prompt_ids(negative_prompt, 1, self.vocabulary)
        assert ids is not None
        return [replace(request, negative=image_gpt.prefix(self.config, ids[0].tolist())) for request in found]

    def check_drawn(self, requests: Sequence[Request], filled: Filled) -> None:
        """Raises CheckpointError if the model cannot be relied on for what it drew for these requests: its numbers grow
        too large on the way."""
        self._check_drawn(requests, filled)
