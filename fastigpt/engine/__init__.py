"""What an engine is: the two things a model asks of the machine, score known tokens and fill unknown ones.

An engine holds the weights in the layout its device likes. It reads sequences [prompt words (none, or all
`prompt_length` slots), start, x₀, x₁, …] and knows nothing of images, palettes or files. model.py checks every argument
before it gets here, cuts jobs into waves that fit memory, and never looks inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from fastigpt.config import ImageGPTConfig
from fastigpt.sampling import Drawing

OnRow = Callable[[range, int, torch.Tensor], None]
"""on_row(images, row, tokens): canvas row `row` of these images of the job is final; tokens int64 [len(images),
width]."""


@dataclass(frozen=True)
class Job:
    """One wave of canvases to fill. All tensors are contiguous int64 on the CPU.

    tokens: [n, n_pixels], −1 = draw. index: [n], the image index of the noise contract. source: [n], equal where images
    have the same prompt and the same leading known run, which is then prefilled and stored once; non-decreasing.
    prompt: [n, prompt_length] word ids, or None. window: tokens scored per pass and image, "auto" = the engine chooses.
    draft: a smaller model of the same canvas and colours, on the same backend, that guesses the window; None: the
    model's own logits do. It changes how many passes a job takes, and no token.
    """

    tokens: torch.Tensor
    index: torch.Tensor
    source: torch.Tensor
    prompt: torch.Tensor | None
    drawing: Drawing
    window: int | Literal["auto"] = "auto"
    draft: Engine | None = None


@dataclass(frozen=True)
class Filled:
    """tokens: int64 [n, n_pixels], all known. pass_starts: bool [n, n_pixels], True where a pass of that image began:
    its sum over an image is the passes that image took after its prefill."""

    tokens: torch.Tensor
    pass_starts: torch.Tensor


class Engine(Protocol):
    """A backend with weights loaded. Safe to call from several Python threads."""

    name: str
    config: ImageGPTConfig
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype

    def logits(self, tokens: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, n_colors], float32 (the reference engine: its dtype): [:, i] scores token i given tokens[:, :i].
        tokens: int64 [B, T], T ≤ n_pixels."""
        ...

    def hidden(self, tokens: torch.Tensor, layer: int, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [B, T, n_embd]: the hidden state after `layer` blocks at the positions that score x₀ … x_{T−1},
        normed by the norm that reads it (ln_1 of block `layer`, ln_f for layer = n_layer)."""
        ...

    def fill(self, job: Job, on_row: OnRow | None = None) -> Filled:
        """Draws the unknown tokens in raster order and keeps the known ones exactly."""
        ...

    def max_batch(self, job: Job) -> int:
        """How many images of such a job fit into the memory that is free now, at least 1."""
        ...

    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        """A function that runs one pass each time it is called: scores a window of tokens of each of n images at this
        position and draws them, on caches of made-up contents. For benchmarks and cost models; returns when the pass is
        done, or on a GPU when it is launched."""
        ...
