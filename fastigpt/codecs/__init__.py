"""Images to tokens and back: what every codec offers, and where on an image a token is.

A model draws a grid of tokens in raster order and knows nothing of pixels; a codec knows what they look like. In a
`PaletteCodec` a token is a pixel's colour. In others it may stand for a patch of many pixels, and what is seen there
may depend on its neighbours as well.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

UNKNOWN = 128
"""Value of every channel where a preview knows nothing: a neutral grey."""


class ImageCodec(Protocol):
    """Safe to share between threads. Codecs are equal if the same token means the same to both, which lets one model
    draft for another. They can be pickled, as models are."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens: the canvas."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels: whole multiples of the grid's, so that a token stands for a patch,
        and a row of tokens for a band of pixels (see `patch`)."""
        ...

    @property
    def n_tokens(self) -> int:
        """Tokens are 0 … n_tokens − 1: the colours of a palette, the entries of a codebook."""
        ...

    def on(self, device: torch.device, dtype: torch.dtype) -> ImageCodec:
        """The same codec, whose pixels are made where and as exactly as an engine of this dtype computes. Tokens of
        images stay what they are."""
        ...

    def encode(self, images: np.ndarray) -> torch.Tensor:
        """int64 [n, h·w] on the CPU, in raster order. images: uint8 [n, height, width, 3], RGB, of `size`. The same
        image has the same tokens in whatever company it comes."""
        ...

    def decode(self, tokens: torch.Tensor) -> np.ndarray:
        """uint8 [n, height, width, 3]. tokens: int64 [n, h·w], all known. The same tokens look the same in whatever
        company they come."""
        ...

    def preview(self, tokens: torch.Tensor) -> np.ndarray:
        """uint8 [n, height, width, 3] of canvases that are not finished. tokens: int64 [n, h·w], −1 = unknown.

        Patches of unknown tokens are neutral grey (UNKNOWN); a canvas without any looks as `decode` shows it. Those of
        known tokens look as they will when all is known in a PaletteCodec; other codecs may still change them, most
        of all beside unknown ones.
        """
        ...


def patch(codec: ImageCodec) -> tuple[int, int]:
    """Height and width in pixels of what a token stands for: (1, 1) in a PaletteCodec."""
    (h, w), (height, width) = codec.grid, codec.size
    return height // h, width // w


def band(codec: ImageCodec, row: int) -> slice:
    """The rows of pixels that a row of tokens stands for."""
    height, _ = patch(codec)
    return slice(row * height, (row + 1) * height)


def tokens_of(codec: ImageCodec, pixels: np.ndarray) -> torch.Tensor:
    """bool [n, h·w]: the tokens that stand for any of these pixels. pixels: bool [n, height, width], of `size`."""
    (h, w), (tall, wide) = codec.grid, patch(codec)
    patches = torch.from_numpy(np.ascontiguousarray(pixels)).view(len(pixels), h, tall, w, wide)
    return patches.any(4).any(2).flatten(1)


def pixels_of(codec: ImageCodec, tokens: torch.Tensor) -> np.ndarray:
    """bool [n, height, width]: the pixels that these tokens stand for. tokens: bool [n, h·w]."""
    tall, wide = patch(codec)
    cells = tokens.view(len(tokens), *codec.grid)
    return cells.repeat_interleave(tall, 1).repeat_interleave(wide, 2).numpy()
