"""A model that is served, and what parameters and pictures mean to it: which canvases are drawn, and what they look
like, finished or not."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastigpt.job import Request
from fastigpt.model import Model
from fastigpt.prompts import ClassReader, Vocabulary, WordReader
from fastigpt.sampling import fresh_seed
from fastigpt.server.batch import Batch
from fastigpt.server.errors import invalid
from fastigpt.server.parameters import Common, Edit

LARGEST_SIDE = 2048
"""Pixels of an enlarged picture, at most."""
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_OPTIONS = ("prompt", "guidance_scale", "negative_prompt", "first_index", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Job:
    """What a request asks of a model. canvas: int64 [n_positions], −1 = draw. words, known: what the model reads of
    the prompt and of the upload, in tokens."""

    requests: list[Request]
    seed: int
    canvas: torch.Tensor
    words: int

    @property
    def known(self) -> int:
        return int((self.canvas >= 0).sum())


class Served:
    """name: what clients call it. created: seconds since 1970, when it was loaded."""

    def __init__(self, name: str, model: Model, batch: Batch) -> None:
        self.name, self.model, self.batch, self.created = name, model, batch, int(time.time())
        self.spec = model.engine.spec

    @property
    def reads_prompts(self) -> bool:
        return self.model.reader is not None

    @property
    def vocabulary(self) -> Vocabulary | None:
        """All words that the model reads, if there is such a list."""
        reader = self.model.reader
        return reader.vocabulary if isinstance(reader, WordReader) else None

    @property
    def prompts(self) -> str:
        """What a prompt may be: "words" of the vocabulary, "text", a "class", or "none"."""
        reader = self.model.reader
        if reader is None:
            return "none"
        return "words" if isinstance(reader, WordReader) else "class" if isinstance(reader, ClassReader) else "text"

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of its pictures in pixels."""
        height, width = self.model.image_size
        return width, height

    def scale(self, size: str) -> int:
        """How many times the model's own size a size is. Raises ApiError that says which there are."""
        if size == "auto":
            return 1
        width, height = self.size
        most = max(1, LARGEST_SIDE // max(width, height))
        found = _SIZE.fullmatch(size)
        times = int(found[1]) // width if found else 0
        if not found or not 1 <= times <= most or (int(found[1]), int(found[2])) != (times * width, times * height):
            raise invalid(
                "size",
                f"Invalid size '{size[:40]}': {self.name} draws {width}x{height}, 'auto', and that enlarged by whole "
                f"numbers up to {most} ({most * width}x{most * height}).",
            )
        return times

    def generation(self, given: Common) -> Job:
        return self._job(given, torch.full((self.spec.n_positions,), -1, dtype=torch.int64, device="cpu"))

    def edit(self, given: Edit, photo: Image.Image, mask: np.ndarray | None) -> Job:
        """photo: upright. mask: bool [H, W], True = draw anew, of the photo's size or the canvas's."""
        try:
            known = self.model.known_cells(photo, rows=given.rows, mask=mask)[0]
            tokens = self.model.encode(photo)[0]
        except ValueError as error:
            named = next((name for name in ("rows", "mask") if str(error).startswith((name, f"give {name}"))), "image")
            message = str(error)
            if named == "image" and given.rows is None and mask is None:
                message = "nothing says what to draw anew: send a mask, 'rows', or an image with transparent parts"
                named = "mask"
            raise invalid(named, f"{message}.") from None
        return self._job(given, tokens.masked_fill(~known, -1))

    def _job(self, given: Common, canvas: torch.Tensor) -> Job:
        options: dict[str, Any] = {name: getattr(given, name) for name in _OPTIONS}
        if not given.prompt.strip():  # nothing to follow
            options["prompt"] = None
        # Short enough for every reader of JSON to keep all its digits.
        seed = fresh_seed() >> 10 if given.seed is None else given.seed
        for name in ("prompt", "negative_prompt"):
            self._check_words(name, options[name])
        try:
            requests = self.model.requests(canvas.expand(given.n, -1), seed=seed, **options)
        except ValueError as error:
            named = str(error).partition(" ")[0].strip(":")
            raise invalid(named if named in type(given).model_fields else "prompt", f"{error}.") from None
        return Job(requests, seed, canvas, self._words_read(options["prompt"]))

    def _check_words(self, name: str, text: str | None) -> None:
        if text is None:
            return
        if self.model.reader is None:
            raise invalid(name, f"{self.name} reads no text: '{name}' must be empty.")
        try:
            self.model.reader.prefix(text, name)
        except ValueError as error:
            raise invalid(name, f"{error}.") from None

    def _words_read(self, prompt: str | None) -> int:
        if prompt is None:
            return 0
        if self.vocabulary is not None:
            return sum(word > 0 for word in self.vocabulary.encode(prompt))
        return 0 if self.model.reader is None else len(self.model.reader.prefix(prompt))

    def pixels(self, tokens: torch.Tensor) -> np.ndarray:
        """uint8 [H, W, 3] of a canvas int64 [n_positions]; grey where it is −1."""
        return self.model.preview(tokens[None])[0]

    def described(self, moderated: bool) -> dict[str, Any]:
        """As a model of the API."""
        width, height = self.size
        vocabulary, defaults = self.vocabulary, self.model.defaults
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fastigpt",
            "size": f"{width}x{height}",
            "prompts": self.prompts,
            "temperature": defaults.get("temperature", 1.0 if defaults else None),
            "guidance_scale": defaults.get("guidance_scale"),
            "words": [] if vocabulary is None else list(vocabulary.words[1:]),
            "examples": [] if vocabulary is None else list(vocabulary.examples),
            "moderated": moderated,
        }
