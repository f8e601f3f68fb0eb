"""Images in and out: anything a person may hand over becomes uint8 RGB on the canvas, and samples become a picture.

Resizing is transformers' ImageGPTImageProcessorPil's: Pillow's bilinear filter on uint8 RGB, aspect ratio ignored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastigpt.arguments import whole


def as_image_list(images: Any, *, name: str = "images") -> list[Image.Image]:
    """PIL images in mode RGB or RGBA from: one image or a sequence of images, each a PIL image, a uint8 array [H, W],
    [H, W, 1], [H, W, 3] or [H, W, 4] or batch [n, H, W, 3|4], or a uint8 tensor [3|4, H, W] or [n, 3|4, H, W].

    CMYK, palette, grey, 1-bit and 16-bit grey images are converted; those with transparency come back as RGBA.
    Raises TypeError for other kinds and dtypes, ValueError for wrong shapes, empty lists and images without pixels.
    """
    if isinstance(images, (str, bytes)):
        raise TypeError(f"{name} must be images, not a file name: open it with PIL.Image.open")
    if isinstance(images, Sequence):
        found = [image for item in images for image in as_image_list(item, name=name)]
    elif isinstance(images, Image.Image):
        found = [_from_pil(images, name)]
    elif isinstance(images, torch.Tensor):
        found = _from_tensor(images, name)
    elif isinstance(images, np.ndarray):
        found = _from_array(images, name)
    else:
        raise TypeError(f"{name} must be PIL images, numpy arrays or torch tensors, not {type(images).__name__}")
    if not found:
        raise ValueError(f"{name} is empty")
    return found


def _from_pil(image: Image.Image, name: str) -> Image.Image:
    if image.width == 0 or image.height == 0:
        raise ValueError(f"{name} holds an image of {image.width} × {image.height} pixels")
    if image.mode in ("RGB", "RGBA"):
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{name} holds an image of mode {image.mode!r}; convert it to RGB first")
        # 16-bit grey: Pillow's own conversion would clip at 255 instead of scaling.
        return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA")
    return image.convert("RGB")


def _from_tensor(tensor: torch.Tensor, name: str) -> list[Image.Image]:
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name} must be a uint8 tensor of values 0 to 255, not {tensor.dtype}")
    if tensor.ndim not in (3, 4) or tensor.shape[-3] not in (3, 4):
        raise ValueError(f"{name} must have shape [3, H, W] or [n, 3, H, W] as a tensor, not {list(tensor.shape)}")
    return _from_array(tensor.movedim(-3, -1).cpu().numpy(), name)


def _from_array(array: np.ndarray, name: str) -> list[Image.Image]:
    if array.dtype != np.uint8:
        raise TypeError(f"{name} must be a uint8 array of values 0 to 255, not {array.dtype}")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4):
        raise ValueError(f"{name} must have shape [H, W, 3] or [n, H, W, 3] as an array, not {list(array.shape)}")
    batch = array if array.ndim == 4 else array[None]
    if 0 in batch.shape[1:]:
        raise ValueError(f"{name} holds an image of {batch.shape[2]} × {batch.shape[1]} pixels")
    return [Image.fromarray(np.ascontiguousarray(a if a.shape[-1] > 1 else a.repeat(3, -1))) for a in batch]


def to_canvas(image: Image.Image, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]. Transparent parts are shown on white."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def transparent_cells(image: Image.Image, height: int, width: int) -> np.ndarray | None:
    """bool [height, width]: cells more than half of which have alpha 0; None if the image has no alpha."""
    if image.mode != "RGBA":
        return None
    return _more_than_half(np.asarray(image.getchannel("A")) == 0, height, width)


def mask_cells(mask: Any, image_sizes: Sequence[tuple[int, int]], height: int, width: int) -> np.ndarray:
    """bool [n, height, width], True = draw anew, from a mask for all images or one for each.

    mask: bool array or tensor [H, W] or [n, H, W], or a PIL image (white = draw anew), at the canvas's size or at the
    image's own; at the image's size a cell is drawn anew if more than half of it is marked. image_sizes: (width,
    height) of each image. Raises TypeError for other dtypes and ValueError for other sizes.
    """
    array = _mask_array(mask)
    if array.dtype != np.bool_:
        raise TypeError(f"mask must be of dtype bool (True = draw anew), not {array.dtype}")
    if array.ndim not in (2, 3):
        raise ValueError(f"mask must have shape [H, W] or [n, H, W], not {list(array.shape)}")
    count = len(image_sizes)
    if array.ndim == 3 and len(array) != count:
        raise ValueError(f"mask has {len(array)} layers for {count} images")
    cells = np.empty((count, height, width), dtype=bool)
    for i, (image_width, image_height) in enumerate(image_sizes):
        layer = array if array.ndim == 2 else array[i]
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


def _mask_array(mask: Any) -> np.ndarray:
    if isinstance(mask, Image.Image):
        return np.asarray(mask.convert("L")) >= 128
    if isinstance(mask, torch.Tensor):
        return mask.cpu().numpy()
    return np.asarray(mask)


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
