"""Arrays and tensors become pictures. Arrays have their channels last, tensors first, as is usual."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from fastigpt.arguments import plain_tensor

_CHANNELS = (1, 3, 4)
_ROUNDING = 1e-4  # what arithmetic may leave beside [0, 1]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


MAX_PIXELS = 178_956_970
"""Of one image: Pillow's own default limit, whatever its global says at the moment."""


def check_size(width: int, height: int, limit: int = MAX_PIXELS) -> None:
    """Raises ValueError for an image without pixels, and for one that is likely a decompression bomb."""
    if width < 1 or height < 1:
        raise ValueError(f"{width} × {height} pixels")
    if width * height > limit:
        raise ValueError(
            f"{width} × {height} = {width * height} pixels, more than the limit of {limit}: make it smaller first"
        )


def from_array(array: np.ndarray, name: str) -> list[Image.Image]:
    """Pictures of [H, W], [H, W, C], [n, H, W], [n, H, W, C] or [n, 1, H, W]; C is 1, 3 or 4. Dtypes: see `levels`.

    Three axes are one picture if the last is 1, 3 or 4, else grey ones; [3 | 4, H, W] might be either: refused.
    """
    shape = array.shape
    if array.ndim == 4 and shape[3] not in _CHANNELS and shape[1] == 1:
        array = np.moveaxis(array, 1, -1)
    elif array.ndim == 3 and shape[2] not in _CHANNELS and shape[0] in (3, 4):
        raise ValueError(
            f"{name} of shape {list(shape)} could be one image with its channels first or {shape[0]} grey ones: arrays "
            f"have channels last, [H, W, {shape[0]}], grey ones [n, H, W, 1] (or hand over a tensor, channels first)"
        )
    elif array.ndim == 2 or (array.ndim == 3 and shape[2] not in _CHANNELS):
        array = array[..., None]
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[-1] not in _CHANNELS:
        raise ValueError(
            f"{name} must have shape [H, W], [H, W, 3], [n, H, W] or [n, H, W, 3] as an array, not {list(shape)}"
        )
    return list(_pictures(array, name))


def from_tensor(tensor: torch.Tensor, name: str) -> list[Image.Image]:
    """Pictures of [H, W], [C, H, W], [n, H, W] or [n, C, H, W]; C is 1, 3 or 4. Dtypes: see `levels`.

    Three axes are one picture if the first is 1, 3 or 4, else grey ones; [H, W, 1 | 3 | 4] might be either: refused.
    """
    if tensor.dtype not in (torch.uint8, torch.bool, *_FLOATS):
        raise TypeError(f"{name} must be a tensor of uint8, bool or floats in [0, 1], not {tensor.dtype}")
    plain = plain_tensor(name, tensor)
    shape = plain.shape
    if plain.ndim == 3 and shape[0] not in _CHANNELS and shape[2] in _CHANNELS:
        raise ValueError(
            f"{name} of shape {list(shape)} could be one image with its channels last or {shape[0]} grey ones: tensors "
            f"have channels first, [{shape[2]}, H, W], grey ones [n, 1, H, W] (or hand over an array, channels last)"
        )
    if plain.ndim == 2 or (plain.ndim == 3 and shape[0] not in _CHANNELS):
        plain = plain.unsqueeze(-3)
    if plain.ndim == 3:
        plain = plain[None]
    if plain.ndim != 4 or plain.shape[1] not in _CHANNELS:
        raise ValueError(
            f"{name} must have shape [H, W], [3, H, W], [n, H, W] or [n, 3, H, W] as a tensor, not {list(shape)}"
        )
    if plain.dtype == torch.bfloat16:  # numpy has none
        plain = plain.float()
    return list(_pictures(plain.movedim(1, -1).numpy(), name))


def levels(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 of the same shape: 0 … 255 as they are; floats in [0, 1], 1 = white; bool, True = white.

    Raises TypeError for other dtypes, ValueError for floats that are not finite or outside [0, 1].
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(f"{name} must be an array of uint8, bool or floats in [0, 1], not {array.dtype}")
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # so written, NaN fails as well
        raise ValueError(
            f"{name} of dtype {array.dtype} must lie in [0, 1], found {low:g} to {high:g}; give 0 … 255 as uint8"
        )
    return np.rint(array.clip(0, 1).astype(np.float32) * np.float32(255)).astype(np.uint8)


def _pictures(batch: np.ndarray, name: str) -> Iterator[Image.Image]:
    """batch: [n, H, W, C]."""
    for array in batch:
        try:
            check_size(array.shape[1], array.shape[0])
        except ValueError as error:
            raise ValueError(f"{name} holds an image of {error}") from None
        pixels = levels(array, name)
        yield Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[-1] > 1 else pixels.repeat(3, -1)))
