"""What a drawing call returns, collected a chunk at a time in the kind that was asked for: no job is held twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from fastigpt.codecs import ImageCodec
from fastigpt.engine.memory import free_memory

_PIL_IMAGE = 2048  # bytes of a PIL image besides its pixels, about


class Results:
    """Images of a job. kind: "pil" | "np" | "pt" | "tokens". n_positions: tokens of each. codec: makes images of them;
    not needed for "tokens". info: what every PIL image tells of itself; its index comes to it.

    Raises ValueError, before any work, if so many results do not fit the free memory.
    """

    def __init__(
        self, kind: str, count: int, n_positions: int, codec: ImageCodec | None, info: dict[str, str], first_index: int
    ) -> None:
        height, width = (0, 0) if codec is None else codec.size
        check_memory(count, kind, n_positions, (height, width))
        self._kind, self._codec, self._info, self._first = kind, codec, info, first_index
        self._pictures: list[Image.Image] = []
        self._pixels = np.empty((count if kind == "np" else 0, height, width, 3), np.uint8)
        shape, dtype = {
            "pt": ((count, 3, height, width), torch.uint8),
            "tokens": ((count, n_positions), torch.int64),
        }.get(kind, ((0,), torch.uint8))
        self._tensor = torch.empty(shape, dtype=dtype, device="cpu")

    def add(self, images: range, tokens: torch.Tensor) -> None:
        """These images of the job are finished."""
        some = slice(images.start, images.stop)
        if self._kind == "tokens":
            self._tensor[some] = tokens
            return
        assert self._codec is not None
        pixels = self._codec.decode(tokens)
        if self._kind == "pt":
            self._tensor[some] = torch.from_numpy(pixels).movedim(-1, 1)
        elif self._kind == "np":
            self._pixels[some] = pixels
        else:
            for k, image in zip(images, pixels):
                picture = Image.fromarray(image)
                picture.info.update(self._info, index=str(self._first + k))
                self._pictures.append(picture)

    def value(self) -> Any:
        return {"pil": self._pictures, "np": self._pixels}.get(self._kind, self._tensor)


def check_memory(count: int, kind: str, n_positions: int, size: tuple[int, int]) -> None:
    """Raises ValueError if the results of a job cannot be held, whatever its batches are. size: of an image, in pixels;
    for "tokens" it does not matter."""
    height, width = size
    pixels = height * width
    each = {"tokens": 8 * n_positions, "pil": 4 * pixels + _PIL_IMAGE}.get(kind, 3 * pixels)
    free = free_memory(torch.device("cpu"))
    if count * each > free:
        what = f"{n_positions} tokens" if kind == "tokens" else f"{width} × {height} pixels"
        raise ValueError(
            f"{count} images of {what} take {count * each / 1e9:,.1f} GB as "
            f'output_type="{kind}", and {free / 1e9:,.1f} GB are free: draw them in parts, '
            "each with the same seed and a first_index where the last one ended"
        )
