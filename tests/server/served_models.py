"""What the tests of the server share: a tiny model that reads prompts, and an engine that draws when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from conftest import random_weights

from fastigpt import ImageGPT, ImageGPTConfig, Palette
from fastigpt.prompts import Vocabulary

CONFIG = ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, height=6, width=4, n_colors=27, n_words=6, prompt_length=3)
N = CONFIG.n_pixels
EMPTY = torch.full((1, N), -1)
WORDS = Vocabulary(("", "a", "red", "blue", "house", "tree"), 3, ("a red house",))
COLORS = np.array([[r, g, b] for r in (0, 128, 255) for g in (0, 128, 255) for b in (0, 128, 255)], np.uint8)


def tiny_model(backend: str = "cpu", **changes: Any) -> ImageGPT:
    told: dict[str, Any] = {
        "palette": Palette(COLORS, value_range=(0, 255)),
        "vocabulary": WORDS,
        "name": "tiny",
        **changes,
    }
    return ImageGPT(CONFIG, random_weights(CONFIG, 5), backend=backend, **told)


class Gate:
    """Sessions of a model step only as often as they are let. `steps`: how often they have."""

    def __init__(self, model: ImageGPT) -> None:
        self.steps = 0
        self.added: list[Any] = []  # requests, in the order in which they got slots
        self.error: Exception | None = None  # what the next step raises
        self.stands = threading.Event()  # a step waits to be let
        self._let = threading.Semaphore(0)
        self._open = False
        self._engine = model.engine
        model.engine = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def open(self, *arguments: Any, **options: Any) -> Any:
        return _Gated(self, self._engine.open(*arguments, **{**options, "window": 1}))

    def let(self, steps: int) -> None:
        """So many steps more, of one pass each."""
        for _ in range(steps):
            self._let.release()

    def let_all(self) -> None:
        self._open = True
        self._let.release()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """However the block ends, what is in the batch is drawn afterwards."""
        try:
            yield
        finally:
            self.let_all()


class _Gated:
    def __init__(self, gate: Gate, session: Any) -> None:
        self._gate, self._session = gate, session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def add(self, requests: Any) -> list[int]:
        self._gate.added += requests
        return self._session.add(requests)

    def step(self, seconds: float) -> Any:
        gate = self._gate
        if not gate._open and seconds:  # 0: the batch is being started
            gate.stands.set()
            gate._let.acquire()
        gate.steps += 1
        if gate.error is not None:
            error, gate.error = gate.error, None
            raise error
        return self._session.step(0.0)
