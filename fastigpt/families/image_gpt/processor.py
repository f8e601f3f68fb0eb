"""preprocessor_config.json: the palette of a checkpoint, and how an image becomes a canvas.

It is read as transformers' ImageGPTImageProcessorPil reads it: resize with Pillow, multiply by rescale_factor, subtract
image_mean and divide by image_std, take the nearest of `clusters`. Rescaling and normalising only say which values
stand for black and white, so the palette takes them over and images stay uint8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastigpt.codecs.palette import Palette
from fastigpt.codecs.preprocessing import BILINEAR, Preprocessing
from fastigpt.errors import CheckpointError
from fastigpt.untrusted import short

_TYPES = (
    "ImageGPTImageProcessor",
    "ImageGPTImageProcessorFast",
    "ImageGPTImageProcessorPil",
    "ImageGPTFeatureExtractor",
)
_FILTERS = range(6)  # nearest, lanczos, bilinear, bicubic, box, hamming


@dataclass(frozen=True)
class Processor:
    """A preprocessor_config.json. clusters: as stored, or None. value_range: what stands for black and white in them.
    size: height and width images are resized to, where it is a fixed one."""

    clusters: Any
    value_range: tuple[list[float], list[float]]
    size: tuple[int, int] | None
    preprocessing: Preprocessing

    def palette(self) -> Palette | None:
        """Raises ValueError."""
        return None if self.clusters is None else Palette(self.clusters, value_range=self.value_range)

    def preprocessing_for(self, height: int, width: int, source: str) -> Preprocessing:
        """For a canvas of this size. `source` names the file in what is refused."""
        found = self.preprocessing
        refused = found.refused
        if refused is None and found.do_resize and self.size not in (None, (height, width)):
            assert self.size is not None
            refused = f"size is {self.size[0]} × {self.size[1]}, the model's canvas {height} × {width}"
        return Preprocessing(found.resample, found.do_resize, None if refused is None else f"{source}: {refused}")


def parse(data: Any) -> Processor:
    """Raises CheckpointError naming the key that is wrong. A key that is null is one that is missing."""
    if not isinstance(data, dict):
        raise CheckpointError(f"must hold a JSON object, not {type(data).__name__}")
    given = {key: value for key, value in data.items() if value is not None}
    resample = given.get("resample", BILINEAR)
    if isinstance(resample, bool) or not isinstance(resample, int) or resample not in _FILTERS:
        raise CheckpointError(f"resample must be one of Pillow's filters, 0 to 5, not {short(resample)}")
    do_resize = _flag(given, "do_resize")
    size, refused = _size(given.get("size")) if do_resize else (None, None)
    if not _flag(given, "do_color_quantize"):
        refused = "do_color_quantize is false, so images do not become tokens"
    kind = given.get("image_processor_type", given.get("feature_extractor_type", _TYPES[0]))
    if "clusters" in given and kind not in _TYPES:
        raise CheckpointError(f"image_processor_type is {short(kind)}, expected {_TYPES[0]}")
    return Processor(given.get("clusters"), _value_range(given), size, Preprocessing(resample, do_resize, refused))


def config(palette: Palette, preprocessing: Preprocessing, height: int, width: int) -> dict[str, Any]:
    """What `parse`, and transformers' processor, read back as the same."""
    weights = palette.channel_weights
    weighted = bool((weights != 1).any())
    clusters = palette.clusters.astype(np.float64) * weights if weighted else palette.clusters
    return {
        "image_processor_type": _TYPES[0],
        "clusters": [[float(v) for v in row] for row in clusters],
        "do_color_quantize": True,
        "do_normalize": True,
        **({"image_mean": [0.5] * 3, "image_std": [float(0.5 / w) for w in weights]} if weighted else {}),
        "do_resize": preprocessing.do_resize,
        "resample": preprocessing.resample,
        "size": {"height": height, "width": width},
    }


def _flag(given: dict[str, Any], key: str) -> bool:
    value = given.get(key, True)
    if not isinstance(value, bool):
        raise CheckpointError(f"{key} must be true or false, not {short(value)}")
    return value


def _size(size: Any) -> tuple[tuple[int, int] | None, str | None]:
    """(height, width), or None and what about it is refused."""
    if size is None:
        return None, None
    pair = size if isinstance(size, list) else [size, size]
    if isinstance(size, dict):
        if not {"height", "width"} <= size.keys():
            return None, f"size is {short(size)}, which does not always make a canvas of the same shape"
        pair = [size["height"], size["width"]]
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and 0 < v < 2**24 for v in pair):
        raise CheckpointError(f"size must be height and width in pixels, not {short(size)}")
    return (pair[0], pair[1]), None


def _value_range(given: dict[str, Any]) -> tuple[list[float], list[float]]:
    white = 255.0
    if _flag(given, "do_rescale"):
        white *= _numbers(given, "rescale_factor", 1 / 255)[0]
    if white <= 0:
        raise CheckpointError(f"rescale_factor must be positive, not {short(given['rescale_factor'])}")
    if not _flag(given, "do_normalize"):
        return [0.0] * 3, [white] * 3
    mean, std = _numbers(given, "image_mean", 0.5), _numbers(given, "image_std", 0.5)
    if min(std) <= 0:
        raise CheckpointError(f"image_std must be positive, not {short(given['image_std'])}")
    return [-m / s for m, s in zip(mean, std)], [(white - m) / s for m, s in zip(mean, std)]


def _numbers(given: dict[str, Any], key: str, default: float) -> list[float]:
    """One number for each channel."""
    value = given.get(key, default)
    numbers = value if isinstance(value, list) else [value] * 3
    fits = len(numbers) == 3 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers)
    # Beyond these float32 loses the pixels.
    if not fits or not all(abs(v) < 1e6 and math.isfinite(v) for v in numbers):
        raise CheckpointError(f"{key} must be a number, or three, not {short(value)}")
    return [float(v) for v in numbers]
