"""What an engine is: it scores known tokens, and opens sessions in which canvases are drawn.

An engine holds a model's weights in the layout its device likes and knows nothing of images, palettes, words or files.
model.py checks every argument before it gets here. A session has a fixed number of slots, each with one canvas in the
middle of being drawn; one loop drives it: engine/loop.py for jobs, server/batch.py for a server's requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fastigpt.job import Filled, Request
from fastigpt.scalars import whole
from fastigpt.spec import ModelSpec

Window = int | str
"""Tokens that a pass scores of each canvas, guesses included: a number, or "auto", which leaves it to measured times.
It changes the time a canvas takes, and no token."""


@dataclass(frozen=True)
class Advance:
    """How far the canvas of a slot has come: `decided` leading tokens are final. At n_positions it is finished; at the
    request's `stop` it waits for `resume`."""

    slot: int
    decided: int


class Session(Protocol):
    """Slots 0 … capacity − 1. Owned by one loop, so not safe to share between threads; sessions of one engine may be
    used at the same time. A slot's tokens depend neither on the other slots nor on when it came or what was there.
    """

    capacity: int

    def add(self, requests: Sequence[Request]) -> list[int]:
        """Slots of these canvases; what is read before the first unknown token is read now. What equal requests of one
        call share is read and stored once. Raises ValueError if there are fewer free slots."""
        ...

    def step(self, seconds: float) -> list[Advance]:
        """Draws for about that long, at least one pass if a slot has something to draw. Where every slot whose
        canvas is not finished is now. Raises CheckpointError if logits are not finite numbers."""
        ...

    def read(self, slots: Sequence[int]) -> Filled:
        """What these slots hold, on the CPU, in this order."""
        ...

    def resume(self, slot: int, stop: int) -> None:
        """Lets a canvas that waits at its `stop` go on, up to another."""
        ...

    def fork(self, slot: int, indices: Sequence[int]) -> list[int]:
        """Canvases with this one's past and futures of their own: from here on they draw with these image indices. The
        first takes the slot itself, the others free ones. Raises ValueError if there are too few."""
        ...

    def remove(self, slot: int) -> None:
        """Frees a slot, finished or not."""
        ...

    def close(self) -> None:
        """Gives the memory back, or keeps it for the engine's next session. The session must not be used again."""
        ...


class Engine(Protocol):
    """A backend with weights loaded. Safe to call from several Python threads."""

    name: str
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype

    def logits(self, tokens: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, n_tokens], float32 (the reference engine: its dtype): [:, i] scores token i given tokens[:, :i].
        tokens: int64 [B, T], T ≤ n_positions. prefix: int64 [B, L]; None: the unconditional one."""
        ...

    def hidden(self, tokens: torch.Tensor, layer: int, prefix: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [B, T, width]: the hidden state after `layer` blocks at the positions that score x₀ … x_{T−1}, normed
        by the norm that reads it (norm_1 of block `layer`, the last norm for layer = n_layer)."""
        ...

    def open(self, capacity: int, *, window: Window = "auto", draft: Engine | None = None) -> Session:
        """A session of so many slots. draft: a smaller model of the same canvas and tokens, on the same backend, that
        guesses the windows; it changes how many passes a canvas takes, and no token. Guided canvases need the memory of
        two. Raises ValueError for a draft of another backend."""
        ...

    def room(self, *, guided: bool, window: Window = "auto", draft: Engine | None = None) -> int:
        """How many slots of such canvases fit into the memory that is free now, at least 1."""
        ...

    def enough(self, *, guided: bool) -> int | None:
        """Slots from which on more make no canvas cheaper and only take memory; None where more always help."""
        ...

    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        """A function that runs one pass each time it is called: scores a window of tokens of each of n canvases at this
        position and draws them, on caches of made-up contents. For benchmarks and cost models; returns when the pass is
        done, or on a GPU when it is launched."""
        ...


def check_window(window: Window, spec: ModelSpec) -> int | None:
    """A window as a number of tokens, at most the canvas; None for "auto"."""
    if window == "auto":
        return None
    return min(whole("window", window, 1, expected='"auto" or an int'), spec.n_positions)
