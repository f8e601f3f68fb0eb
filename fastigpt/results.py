"""What a drawing call returns, collected a chunk at a time in the kind that was asked for: no job is held twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastigpt.config import ImageGPTConfig
from fastigpt.engine.memory import free_memory

_PIL_IMAGE = 2048  # bytes of a PIL image besides its pixels, about


class Results:
    """Images of a job. kind: "pil" | "np" | "pt" | "tokens". decode: tokens int64 [n, n_pixels] to uint8 [n, H, W, 3].
    info: what every PIL image tells of itself; its index comes to it.

    Raises ValueError, before any work, if so many results do not fit the free memory.
    """

    def __init__(
        self,
        kind: str,
        count: int,
        config: ImageGPTConfig,
        decode: Callable[[torch.Tensor], np.ndarray],
        info: dict[str, str],
        first_index: int,
    ) -> None:
        check_memory(count, config, kind)
        self._kind, self._decode, self._info, self._first = kind, decode, info, first_index
        height, width = config.height, config.width
        self._pictures: list[Image.Image] = []
        self._pixels = np.empty((count if kind == "np" else 0, height, width, 3), np.uint8)
        shape, dtype = {
            "pt": ((count, 3, height, width), torch.uint8),
            "tokens": ((count, config.n_pixels), torch.int64),
        }.get(kind, ((0,), torch.uint8))
        self._tensor = torch.empty(shape, dtype=dtype, device="cpu")

    def add(self, images: range, tokens: torch.Tensor) -> None:
        """These images of the job are finished."""
        some = slice(images.start, images.stop)
        if self._kind == "tokens":
            self._tensor[some] = tokens
        elif self._kind == "pt":
            self._tensor[some] = torch.from_numpy(self._decode(tokens)).movedim(-1, 1)
        elif self._kind == "np":
            self._pixels[some] = self._decode(tokens)
        else:
            for k, pixels in zip(images, self._decode(tokens)):
                picture = Image.fromarray(pixels)
                picture.info.update(self._info, index=str(self._first + k))
                self._pictures.append(picture)

    def value(self) -> Any:
        return {"pil": self._pictures, "np": self._pixels}.get(self._kind, self._tensor)


def check_memory(count: int, config: ImageGPTConfig, kind: str) -> None:
    """Raises ValueError if the results of a job cannot be held, whatever its batches are."""
    pixels = config.n_pixels
    each = {"tokens": 8 * pixels, "pil": 4 * pixels + _PIL_IMAGE}.get(kind, 3 * pixels)
    free = free_memory(torch.device("cpu"))
    if count * each > free:
        raise ValueError(
            f"{count} images of {config.width} × {config.height} pixels take {count * each / 1e9:,.1f} GB as "
            f'output_type="{kind}", and {free / 1e9:,.1f} GB are free: draw them in parts, '
            "each with the same seed and a first_index where the last one ended"
        )
