"""What all routes of a server share: the models, what is allowed, and how a drawn canvas becomes a file."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from fastigpt.server.errors import ApiError, no_such_model
from fastigpt.server.keys import Keys
from fastigpt.server.metrics import Metrics
from fastigpt.server.moderation import Moderation, Question
from fastigpt.server.pictures import Encoding, encode
from fastigpt.server.served import Served

Result = TypeVar("Result")


@dataclass(frozen=True)
class Drawn:
    """What a signature tells of a picture. parents: files of the photographs that were edited, as they were sent."""

    model: str
    seed: int
    index: int
    parents: tuple[bytes, ...] = ()


Sign = Callable[[bytes, str, Drawn], bytes]
"""sign(picture, format, drawn): the file of a picture, signed. format: "png", "webp" or "jpeg"."""


@dataclass(frozen=True)
class Settings:
    """aliases: other names of models. max_body: bytes. max_pixels: of an upload. body_patience: seconds in which more
    of a body must arrive. cancel_on_disconnect: whether images that nobody waits for are given up. keys: None = all are
    let in. sign: None = pictures are not signed."""

    aliases: Mapping[str, str] = field(default_factory=dict)
    max_body: int = 32 << 20
    max_pixels: int = 50_000_000
    body_patience: float = 30.0
    cancel_on_disconnect: bool = True
    keys: Keys | None = None
    moderation: Moderation = field(default_factory=Moderation)
    sign: Sign | None = None


class Service:
    """models: those served, the first of which is drawn from if none is named. Their batches are running. Raises
    ValueError for an alias of a model that is not there."""

    def __init__(self, models: Sequence[Served], settings: Settings) -> None:
        self.models, self.settings = {served.name: served for served in models}, settings
        self.default = models[0]
        for alias, name in settings.aliases.items():
            if name not in self.models:
                raise ValueError(f"--alias {alias}={name}: there is {', '.join(self.models)}, no {name}")
            if alias in self.models:
                raise ValueError(f"--alias {alias}={name}: a model has the name {alias} itself")
        self.metrics = Metrics(lambda: ((served.name, served.batch) for served in models))
        self.draining = False
        # A photograph takes a hundred times longer to decode than a small picture to encode, and more memory.
        self._decoders = ThreadPoolExecutor(2, "fastigpt.decode")
        self._encoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "fastigpt.encode")
        self._hooks = ThreadPoolExecutor(16, "fastigpt.moderation")

    def find(self, name: str | None) -> Served:
        """The model of that name. Raises ApiError."""
        if name is None:
            return self.default
        found = self.models.get(self.settings.aliases.get(name, name))
        if found is None:
            raise no_such_model(name[:100], list(self.models))
        return found

    @property
    def ready(self) -> bool:
        return not self.draining and all(served.batch.open for served in self.models.values())

    def drain(self) -> None:
        """Takes no more images, and returns when those that were asked for are drawn."""
        self.draining = True
        for served in self.models.values():
            served.batch.drain()

    async def decode(self, work: Callable[[], Result]) -> Result:
        """Runs work on uploads, little at a time: it takes memory."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)

    async def encode(self, work: Callable[[], Result]) -> Result:
        """Runs work on what is sent."""
        return await asyncio.get_running_loop().run_in_executor(self._encoders, work)

    def picture(self, served: Served, canvas: torch.Tensor, how: Encoding, drawn: Drawn) -> bytes:
        """The file of a canvas int64 [n_positions], finished or not, signed if pictures are."""
        facts = {"model": drawn.model, "seed": str(drawn.seed), "index": str(drawn.index)}
        file = encode(served.pixels(canvas), how, facts)
        if self.settings.sign is None:
            return file
        started = time.perf_counter()
        signed = self.settings.sign(file, how.format, drawn)
        self.metrics.sign.observe(time.perf_counter() - started)
        return signed

    async def moderate(self, question: Question) -> None:
        """Raises ApiError for what the operator refuses."""
        moderation = self.settings.moderation
        if not moderation:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(self._hooks, moderation.check, question)
        except ApiError:
            self.metrics.refused.labels(f"moderation_{question.stage}").inc()
            raise

    def close(self) -> None:
        for executor in (self._decoders, self._encoders, self._hooks):
            executor.shutdown(wait=False, cancel_futures=True)
