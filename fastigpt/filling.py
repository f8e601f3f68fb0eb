"""The one road of everything that draws: options are checked, canvases are handed to the engine a chunk at a time, and
what comes back is collected in the kind that was asked for."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Unpack

import torch
from PIL import Image

from fastigpt.arguments import flag, whole
from fastigpt.chunks import Repeated, chunks
from fastigpt.codecs import ImageCodec
from fastigpt.engine import Engine, loop
from fastigpt.engine.loop import OnRow
from fastigpt.job import Filled, Request, Stats
from fastigpt.options import DrawOptions, Options, checked
from fastigpt.particles import CANDIDATE, MOST
from fastigpt.particles import run as run_particles
from fastigpt.progress import image_bar
from fastigpt.prompts import PromptReader, prefixes
from fastigpt.results import Results
from fastigpt.spec import ModelSpec


class Fills(ABC):
    """Fills canvases; what it needs of a model for that, Model has."""

    engine: Engine
    reader: PromptReader | None
    name: str
    defaults: Mapping[str, Any]

    @property
    @abstractmethod
    def spec(self) -> ModelSpec: ...
    @abstractmethod
    def known_cells(self, pictures: Any, *, rows: int | None = None, mask: Any = None) -> torch.Tensor: ...
    @abstractmethod
    def _encode(self, pictures: list[Image.Image]) -> torch.Tensor: ...
    @abstractmethod
    def _require_codec(self) -> ImageCodec: ...
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
        count, spec = len(canvases), self.spec
        return_stats = flag("return_stats", return_stats)
        progress = None if given.get("progress") is None else flag("progress", given["progress"])
        codec = None if kind == "tokens" else self._require_codec()
        particles = whole("particles", given.get("particles", 1), 1, MOST)
        options = self._checked(given, count)
        if particles > 1:
            whole("first_index", options.first_index, 0, CANDIDATE - count)  # above it the candidates have their noise
            if on_row is not None:
                raise ValueError("on_row was given with particles: rows of candidates are not final")
        chunks_of_job = self._requests(canvases, options, stop)
        seed, shape = options.drawing.seed, (count, spec.height, spec.columns)
        about = {"seed": str(seed), "model": self.name}
        results = Results(kind, count, spec.n_positions, codec, about, options.first_index)
        starts = torch.empty(shape if return_stats else (0,), dtype=torch.bool, device="cpu")
        how = self._how(options)
        seconds, together = 0.0, 1
        with image_bar(count, progress, spec.height) as bar:
            for chunk, requests in chunks_of_job:

                def report(some: range, row: int, tokens: torch.Tensor, first: int = chunk.start) -> None:
                    bar.rows(len(some), row)
                    if on_row is not None:
                        on_row(range(some.start + first, some.stop + first), row, tokens)

                watching = report if bar.shown or on_row is not None else None
                started = time.perf_counter()
                with self._named():
                    if particles == 1:
                        filled, batch = loop.run(self.engine, requests, on_row=watching, **how)
                    else:
                        filled, batch = run_particles(self.engine, requests, particles, on_done=bar.finished, **how)
                seconds, together = seconds + time.perf_counter() - started, max(together, batch)
                self._check_drawn(requests, filled)
                results.add(chunk, filled.tokens)
                bar.images(chunk.stop)
                if return_stats:
                    starts[chunk.start : chunk.stop] = filled.pass_starts.view(-1, *shape[1:])
        if not return_stats:
            return results.value()
        drawn = (canvases.rows < 0).repeat_interleave(canvases.times, 0).view(shape)
        return results.value(), Stats(seed, drawn, starts, seconds, together)

    def _checked(self, given: Any, count: int) -> Options:
        """The options of a job of so many images: those that are given, else the model's own."""
        return checked(given, count, self.spec, self.defaults)

    def _requests(
        self, canvases: Repeated, options: Options, stop: int | None = None
    ) -> Iterator[tuple[range, list[Request]]]:
        """The canvases as requests, a chunk at a time: which images, and their requests. What can be wrong is told
        now."""
        self._require_head()
        guided = options.drawing.guidance_scale is not None
        named = "prompt" if options.label is None else "label"
        read = self._prefixes(named, options.prompt if options.label is None else options.label, canvases)
        away = self._prefixes("negative_prompt", options.negative_prompt, canvases)
        blank = None if self.reader is None or options.negative_prompt is not None else self.reader.unconditional

        def negative(k: int) -> tuple[int, ...] | None:
            if not guided:
                return None
            return away(k) if blank is None else blank(read(k))

        def make(images: range) -> list[Request]:
            return [
                Request(tokens, options.first_index + k, options.drawing, read(k), negative(k), stop)
                for k, tokens in zip(images, canvases.chunk(images))
            ]

        return ((images, make(images)) for images in chunks(len(canvases), options.batch_size))

    def _how(self, options: Options) -> dict[str, Any]:
        """What engine/loop.py takes besides requests."""
        draft = None if options.draft is None else self._drafting(options.draft)
        return {"batch_size": options.batch_size, "window": options.window, "draft": draft}

    def _check_drawn(self, requests: Sequence[Request], filled: Filled) -> None:
        tokens = filled.tokens[:, : requests[0].stop]
        read = [request.prefix for request in requests]
        away = [request.negative for request in requests if request.negative is not None]  # of all, or of none
        for what in (read, away):
            for index, prefix in self.spec.by_length(what):
                self._check_overflow(tokens[index], prefix)

    def _prefixes(
        self, name: str, prompt: str | Sequence[str] | None, canvases: Repeated
    ) -> Callable[[int], tuple[int, ...]]:
        """What is read in front of image k of the job: for one prompt for all images, or one for each canvas that was
        given; without a prompt the unconditional prefix. `name`: the argument's."""
        if prompt is None:
            return lambda k: self.spec.unconditional
        count = 1 if isinstance(prompt, str) else len(canvases.rows)
        read, each = prefixes(prompt, count, self.reader, name), len(canvases) // count
        return lambda k: read[k // each]

    def _empty(self, n: int) -> Repeated:
        return Repeated(torch.tensor(-1, device="cpu").expand(n, self.spec.n_positions))

    def requests(self, tokens: torch.Tensor, **options: Unpack[DrawOptions]) -> list[Request]:
        """What an engine is asked for canvases int64 [n, n_positions], −1 = draw, with one set of options: for those
        who run a session of their own, such as a server."""
        choice = self._checked(options, len(tokens))
        return [request for _, chunk in self._requests(Repeated(tokens), choice) for request in chunk]

    def check_drawn(self, requests: Sequence[Request], filled: Filled) -> None:
        """Raises CheckpointError if the model cannot be relied on for what it drew for these requests: its numbers grow
        too large on the way."""
        self._check_drawn(requests, filled)
