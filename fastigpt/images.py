"""Images in and out: anything a person may hand over becomes uint8 RGB on the canvas, and samples become a picture.

Files and PIL images are read in image_files.py, arrays and tensors in image_arrays.py.

Resizing is transformers' ImageGPTImageProcessorPil's: Pillow's bilinear filter on uint8 RGB, aspect ratio ignored.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastigpt.arguments import plain_tensor, whole
from fastigpt.image_arrays import from_array, from_tensor
from fastigpt.image_files import from_pil, read_image


def as_image_list(images: Any, *, name: str = "images") -> list[Image.Image]:
    """Upright pictures in mode RGB or RGBA from one of these, or a sequence of them, mixed as one likes:

    a file's name (str or Path); a PIL image of any mode; an array [H, W], [H, W, C], [n, H, W], [n, H, W, C] or
    [n, 1, H, W]; a tensor [H, W], [C, H, W], [n, H, W] or [n, C, H, W]. C is 1, 3 or 4 channels: grey, RGB, RGBA.
    Dtypes are uint8, bool (True = white) and floats in [0, 1]. Three axes are read as one image wherever the axis of
    channels (an array's last, a tensor's first) is 1, 3 or 4 long, else as grey images; [3 | 4, H, W] as an array and
    [H, W, 1 | 3 | 4] as a tensor might be either and are refused. Files and PIL images: see `read_image`, `from_pil`.

    Raises TypeError for other kinds and dtypes; ValueError for other shapes, values out of range, empty lists, images
    without pixels or with more than MAX_PIXELS, and files that cannot be read.
    """
    if isinstance(images, (str, os.PathLike)):
        return [read_image(images)]
    if isinstance(images, Image.Image):
        return [from_pil(images, name)]
    if isinstance(images, torch.Tensor):
        found = from_tensor(images, name)
    elif isinstance(images, np.ndarray):
        found = from_array(images, name)
    elif isinstance(images, Sequence) and not isinstance(images, (bytes, bytearray, memoryview)):
        try:
            found = [image for item in images for image in as_image_list(item, name=name)]
        except RecursionError:
            raise ValueError(f"{name} is a list that is nested too deeply") from None
    else:
        raise TypeError(
            f"{name} must be file names, PIL images, numpy arrays or torch tensors, not {type(images).__name__}; open "
            "encoded images with PIL.Image.open"
        )
    if not found:
        raise ValueError(f"{name} is empty")
    return found


def on_white(image: Image.Image) -> Image.Image:
    """An RGB or RGBA picture in RGB, as it looks on white paper: what is hidden under alpha 0 is not in it."""
    if image.mode == "RGBA":
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def to_canvas(image: Image.Image, height: int, width: int, resample: int = Image.Resampling.BILINEAR) -> np.ndarray:
    """uint8 [height, width, 3]. Transparent parts are shown on white. resample: Pillow's number of the filter."""
    return np.asarray(on_white(image).resize((width, height), resample))


def transparent_cells(image: Image.Image, height: int, width: int) -> np.ndarray | None:
    """bool [height, width]: cells more than half of which have alpha 0; None if the image has no alpha."""
    if image.mode != "RGBA":
        return None
    return _more_than_half(np.asarray(image.getchannel("A")) == 0, height, width)


def mask_cells(mask: Any, image_sizes: Sequence[tuple[int, int]], height: int, width: int) -> np.ndarray:
    """bool [n, height, width], True = draw anew, from a mask for all images or one for each.

    mask: bool array or tensor [H, W], [n, H, W] or [n, 1, H, W]; a picture, by file name or as a PIL image (white =
    draw anew); or a list of [H, W] masks and pictures, one for each image. At the canvas's size or at the image's own
    (upright); at the image's a cell is drawn anew if more than half of it is marked. image_sizes: (width, height) of
    each image. Raises TypeError for other dtypes and ValueError for other sizes.
    """
    layers, for_all = _mask_layers(mask)
    count = len(image_sizes)
    if not for_all and len(layers) != count:
        raise ValueError(f"mask has {len(layers)} layers for {count} images")
    cells = np.empty((count, height, width), dtype=bool)
    for i, (image_width, image_height) in enumerate(image_sizes):
        layer = layers[0 if for_all else i]
        if layer.shape == (height, width):
            cells[i] = layer
        elif layer.shape == (image_height, image_width):
            cells[i] = _more_than_half(layer, height, width)
        else:
            raise ValueError(
                f"mask is {layer.shape[1]} × {layer.shape[0]}; it must have the size of the canvas, "
                f"{width} × {height}, or of the image, {image_width} × {image_height}"
            )
    return cells


def _mask_layers(mask: Any) -> tuple[Sequence[np.ndarray], bool]:
    """bool [H, W] each, and whether there is one for all images."""
    if isinstance(mask, (str, os.PathLike)):
        mask = read_image(mask)
    if isinstance(mask, Image.Image):
        return [np.asarray(on_white(from_pil(mask, "mask")).convert("L")) >= 128], True
    kinds = (str, os.PathLike, Image.Image, np.ndarray, torch.Tensor)
    if isinstance(mask, Sequence) and any(isinstance(item, kinds) for item in mask):
        each = [_mask_layers(item)[0] for item in mask]
        if any(len(layers) != 1 for layers in each):
            raise ValueError("mask is a list, so each entry must be a mask of one image, [H, W]")
        return [layers[0] for layers in each], False
    try:
        array = plain_tensor("mask", mask).numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"mask must be a bool array [H, W] or [n, H, W]: {error}") from None
    if array.dtype != np.bool_:
        raise TypeError(f"mask must be of dtype bool (True = draw anew), not {array.dtype}")
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim not in (2, 3):
        raise ValueError(f"mask must have shape [H, W] or [n, H, W], not {list(array.shape)}")
    return ([array], True) if array.ndim == 2 else (list(array), False)


def _more_than_half(marked: np.ndarray, height: int, width: int) -> np.ndarray:
    share = Image.fromarray(marked.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
    return np.asarray(share) > 0.5


def grid(images: Any, columns: int | None = None, *, scale: int | None = None, gap: int | None = None) -> Image.Image:
    """One picture of many, large enough to look at: in a notebook, `fastigpt.grid(model.sample(16))`.

    images: as for `encode`, all of one size [H, W]; transparent parts are shown on white. columns: images in a row;
    None: as square as can be. scale: each pixel becomes this many, squared; None: as many as fit 128 / max(H, W).
    gap: pixels of white between and around; None: half the scale, at least 2. Returns an RGB image.

    Raises ValueError for images of different sizes and for a picture of more than LARGEST_GRID pixels.
    """
    pictures = as_image_list(images)
    width, height = pictures[0].size
    for picture in pictures:
        if picture.size != (width, height):
            raise ValueError(
                f"images of a grid must have one size; found {width} × {height} and {picture.width} × {picture.height}"
            )
    layout = GridLayout.of(len(pictures), height, width, columns, scale, gap)
    sheet = np.full((layout.height, layout.width, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        y, x = layout.corner(i)
        big = to_canvas(picture, height, width).repeat(layout.scale, 0).repeat(layout.scale, 1)
        sheet[y : y + len(big), x : x + big.shape[1]] = big
    return Image.fromarray(sheet)


LARGEST_GRID = 89_478_485
"""Pixels of a grid at most: above it Pillow itself warns when somebody opens the picture."""


@dataclass(frozen=True)
class GridLayout:
    """Where the images of a grid are: `columns` in a row, each pixel `scale` wide. height, width: of the picture."""

    columns: int
    scale: int
    gap: int
    cell: tuple[int, int]
    height: int
    width: int

    @classmethod
    def of(
        cls,
        n: int,
        height: int,
        width: int,
        columns: int | None = None,
        scale: int | None = None,
        gap: int | None = None,
    ) -> GridLayout:
        """The layout of n images of this size. Raises ValueError for one of more than LARGEST_GRID pixels."""
        in_row = math.isqrt(n - 1) + 1 if columns is None else whole("columns", columns, 1)
        factor = max(1, 128 // max(height, width)) if scale is None else whole("scale", scale, 1)
        space = max(2, factor // 2) if gap is None else whole("gap", gap, 0)
        cell = (height * factor + space, width * factor + space)
        sheet = (-(-n // in_row) * cell[0] + space, in_row * cell[1] + space)
        if sheet[0] * sheet[1] > LARGEST_GRID:
            raise ValueError(
                f"a grid of {n} images of {width} × {height} pixels at scale {factor} would be {sheet[1]} × {sheet[0]} "
                f"pixels; the most is {LARGEST_GRID:,} in all"
            )
        return cls(in_row, factor, space, cell, *sheet)

    def corner(self, i: int) -> tuple[int, int]:
        """y, x of image i."""
        return self.gap + i // self.columns * self.cell[0], self.gap + i % self.columns * self.cell[1]
