"""The colours an Image GPT draws with: pixels to tokens, tokens to pixels, and palettes made from images.

`Palette` knows colours, of any number of pixels in any shape; `PaletteCodec` is a canvas of them.

A palette is what transformers calls `clusters`: float32 [n_colors, 3] in [−1, 1], where a channel value p of 0 … 255
stands at p/127.5 − 1. Encoding is exact; csrc/nearest/rgb_table.cpp works out all 2²⁴ colours at the first call.
Palettes of another range are brought there when they are read, so nothing else has to know of ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastigpt.codecs import UNKNOWN
from fastigpt.codecs.k_means import histogram, k_means
from fastigpt.errors import CheckpointError
from fastigpt.nearest import ColorTable, check_threads, describe, like
from fastigpt.operands import readable
from fastigpt.scalars import whole
from fastigpt.untrusted import exists, file_size, refusing, short, shown

MAX_COLORS = 65536
_SLACK = 1 / 255
_FILE_LIMIT = 4 << 20  # bytes of a .npy; MAX_COLORS in float64 take 1.6 MB
ValueRange = tuple[float | Sequence[float], float | Sequence[float]]
_LIMIT = 1.1  # a k-means centre of colours in [−1, 1] is in there itself; a palette of 0 … 255 is not
_OPAQUE_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class Palette:
    """n_colors colours, their tokens, and the way between them.

    clusters: [n_colors, 3], array or tensor; 1 to 65,536 colours. value_range: the values that stand for black and for
    white, such as (−1, 1), (0, 1) or (0, 255); each a number or one for every channel, as after a normalisation by
    channel, whose distances then count. None: (−1, 1), unless the clusters lie wholly in [0, 1], which both ranges
    would explain: then it has to be said. ValueError for another shape, values that are not finite, or far outside.

    Attributes: `clusters`, float32 [n_colors, 3] in [−1, 1], read-only; `colors`, uint8 [n_colors, 3], read-only,
    clip(rint(127.5 · (clusters + 1)), 0, 255) as in OpenAI's code; `n_colors`; `channel_weights`, float64 [3]: what
    differences are multiplied by before distances are compared, 1 unless the range differs by channel.
    """

    def __init__(self, clusters: Any, *, value_range: ValueRange | None = None) -> None:
        values, weights = _canonical(_numbers(clusters), value_range)
        self._set(values, weights)

    def _set(self, values: np.ndarray, weights: np.ndarray) -> None:
        self.clusters, self.channel_weights = values, weights
        self.clusters.setflags(write=False)
        self.channel_weights.setflags(write=False)
        self.colors = np.clip(np.rint(127.5 * (values + 1)), 0, 255).astype(np.uint8)
        self.colors.setflags(write=False)
        self._table = _table(values, weights)

    @property
    def n_colors(self) -> int:
        return len(self.clusters)

    def __len__(self) -> int:
        return self.n_colors

    def __repr__(self) -> str:
        return f"Palette({self.n_colors} colors)"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Palette)
            and np.array_equal(self.clusters, other.clusters)
            and np.array_equal(self.channel_weights, other.channel_weights)
        )

    def __hash__(self) -> int:
        return hash((self.clusters + np.float32(0)).tobytes())  # −0 and 0 are equal

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (np.array(self.clusters), np.array(self.channel_weights))

    @classmethod
    def from_file(cls, path: str | PathLike[str], *, value_range: ValueRange | None = None) -> Palette:
        """Reads a .npy file such as OpenAI's kmeans_centers.npy. value_range: as for Palette. CheckpointError (a
        ValueError) names a bad file."""
        file = Path(path)
        name = f"palette file {shown(fspath(file))}"
        if not exists(file):
            raise CheckpointError(f"{name} does not exist")
        size = file_size(file)
        if size > _FILE_LIMIT:
            raise CheckpointError(f"{name} has {size} bytes, more than {MAX_COLORS} colours take")
        with refusing(name, ""):
            # Mapped, so that a header which promises more than the file holds is refused before memory is taken.
            values = np.load(file, mmap_mode="r", allow_pickle=False)
            if not isinstance(values, np.ndarray):
                values.close()
                raise ValueError("an archive of arrays, expected one array")
            return cls(np.array(values), value_range=value_range)

    def encode(self, pixels: Any, *, threads: int | None = None) -> Any:
        """Token of every pixel: the index of the nearest cluster, the lowest on ties.

        pixels: uint8 [..., 3] (so images [H, W, 3] and batches) of any strides, read in place: numpy array, torch
        tensor on the CPU or on CUDA, or whatever else `nearest_centroid` takes; or a PIL image without transparency, or
        a list of them of one size. Returns int64 [...] of the same kind and device (numpy for PIL images).

        Nearest is meant in real arithmetic, a pixel p standing at p/127.5 − 1 exactly. transformers has two processors,
        both in float32 (its PIL one in float64 when clusters came as a list), as |x|² − 2x·c + |c|², whose rounding
        can turn around two clusters that are nearly or exactly equally far. They differ from each other and from this
        method on such pixels only: by the float32 rounding of a distance of up to 12, that is 1e-6 or so.

        Raises TypeError for another dtype or kind, ValueError for another shape.
        """
        if isinstance(pixels, Image.Image):
            pixels = _array_of(pixels)
        elif isinstance(pixels, (list, tuple)) and pixels and all(isinstance(p, Image.Image) for p in pixels):
            sizes = {p.size for p in pixels}
            if len(sizes) > 1:
                raise ValueError(f"images of one batch must have one size, not {sorted(sizes)}")
            pixels = np.stack([_array_of(p) for p in pixels])
        x = describe("pixels", pixels)
        if x.dtype != "uint8":
            raise TypeError(f"pixels must be uint8 (0 … 255), not {x.dtype}")
        if not x.shape or x.shape[-1] != 3:
            raise ValueError(f"pixels must have shape [..., 3] (channels last), not {list(x.shape)}")
        return like(pixels, self._table.search(x, check_threads(threads)))

    def decode(self, tokens: Any) -> Any:
        """Colours of tokens: integers [...] in 0 … n_colors − 1, numpy array or torch tensor → uint8 [..., 3] of the
        same kind and device. Raises TypeError for another kind or dtype, ValueError for tokens out of range."""
        if isinstance(tokens, torch.Tensor):
            tokens = readable("tokens", tokens)
            if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
                raise TypeError(f"tokens must be integers, not {tokens.dtype}")
            self._check_range(tokens)
            return torch.from_numpy(self.colors.copy()).to(tokens.device)[tokens.long()]
        if not isinstance(tokens, np.ndarray):
            raise TypeError(f"tokens must be a numpy array or a torch tensor, not {type(tokens).__name__}")
        if tokens.dtype.kind not in "iu":
            raise TypeError(f"tokens must be integers, not {tokens.dtype}")
        self._check_range(tokens)
        return self.colors[tokens]

    def _check_range(self, tokens: np.ndarray | torch.Tensor) -> None:
        if 0 in tokens.shape:
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.n_colors:
            raise ValueError(f"tokens must be in 0 … {self.n_colors - 1}; found {low if low < 0 else high}")

    @classmethod
    def fit(cls, images: Any, n_colors: int = 512, seed: int = 0) -> Palette:
        """Palette of n_colors by k-means over all pixels of images, seeded by k-means++; the same seed gives the same
        palette.

        images: uint8 [..., 3], array or tensor, or whatever `fastigpt.images.as_image_list` reads (files, PIL images,
        grey ones; transparent parts on white), or a list of such of any sizes. Raises ValueError when there are fewer
        different colours than n_colors, and what `as_image_list` raises.
        """
        n_colors = whole("n_colors", n_colors, 1, MAX_COLORS)
        colors, counts = histogram(images)
        if len(colors) < n_colors:
            raise ValueError(f"images have {len(colors)} different colours, fewer than n_colors = {n_colors}")
        rng = np.random.default_rng(seed)
        points = colors.astype(np.float32) / np.float32(127.5) - np.float32(1)
        return cls(k_means(points, counts.astype(np.float64), n_colors, rng), value_range=(-1, 1))


class PaletteCodec:
    """An ImageCodec with a token for each pixel: the nearest colour of a palette. A token decides its pixel alone, so
    rows and previews look as they will in the finished image.

    palette: what the tokens mean. height, width: of the canvas, in pixels and in tokens.
    """

    def __init__(self, palette: Palette, height: int, width: int) -> None:
        self.palette, self.grid, self.size, self.n_tokens = palette, (height, width), (height, width), palette.n_colors

    def on(self, device: torch.device, dtype: torch.dtype) -> PaletteCodec:
        return self  # there is nothing to compute

    def encode(self, images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.palette.encode(images)).flatten(1)

    def decode(self, tokens: torch.Tensor) -> np.ndarray:
        return self.palette.decode(tokens.view(-1, *self.grid).numpy())

    def preview(self, tokens: torch.Tensor) -> np.ndarray:
        known = (tokens >= 0).view(-1, *self.grid, 1).numpy()
        return np.where(known, self.decode(tokens.clamp(min=0)), np.uint8(UNKNOWN))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PaletteCodec) and (self.palette, self.size) == (other.palette, other.size)

    def __hash__(self) -> int:
        return hash((self.palette, self.size))

    def __repr__(self) -> str:
        return f"PaletteCodec({self.palette.n_colors} colors, {self.size[0]}×{self.size[1]})"


def _table(clusters: np.ndarray, weights: np.ndarray) -> ColorTable:
    """In units of half a level all is exact: 255 · (p/127.5 − 1) = 2p − 255, and 255 · c fits float64. Where distances
    differ by channel, both are rounded to float32."""
    levels = np.tile(2.0 * np.arange(256) - 255.0, (3, 1))
    points = 255 * clusters.astype(np.float64)
    if (weights != 1).any():
        levels = (levels * weights[:, None]).astype(np.float32).astype(np.float64)
        points = (255 * clusters * weights).astype(np.float32).astype(np.float64)
    return ColorTable(points, levels)


def _restored(clusters: np.ndarray, weights: np.ndarray) -> Palette:
    """A pickled palette: what is in [−1, 1] already is not brought there again."""
    palette = Palette.__new__(Palette)
    palette._set(clusters, weights)
    return palette


def _numbers(clusters: Any) -> np.ndarray:
    """float64 [n_colors, 3], finite."""
    try:
        if isinstance(clusters, torch.Tensor):
            if clusters.is_complex():
                raise TypeError
            clusters = readable("clusters", clusters).detach().cpu().double().numpy()
        given = np.asarray(clusters)
        if given.dtype.kind not in "biufO":
            raise TypeError
        values = np.array(given, dtype=np.float64, order="C")
    except (TypeError, ValueError, OverflowError, RuntimeError, RecursionError):
        raise ValueError(f"clusters must be numbers of shape [n_colors, 3], not {short(clusters, 60)}") from None
    if values.ndim != 2 or values.shape[1] != 3 or not 1 <= values.shape[0] <= MAX_COLORS:
        raise ValueError(
            f"clusters must have shape [n_colors, 3] with 1 to {MAX_COLORS} colours, not {list(values.shape)}"
        )
    if not np.isfinite(values).all():
        row = np.flatnonzero(~np.isfinite(values).all(axis=1))[0]
        raise ValueError(f"clusters must be finite; row {row} is {values[row].tolist()}")
    return values


def _canonical(values: np.ndarray, value_range: ValueRange | None) -> tuple[np.ndarray, np.ndarray]:
    """float32 clusters in [−1, 1], and the weights of the channels, float64 [3]."""
    found = f"found {values.min():g} to {values.max():g}"
    if value_range is None:
        if values.min() >= -_SLACK and values.max() <= 1 + _SLACK:
            raise ValueError(
                f"clusters in [0, 1] ({found}) may be all colours, 0 black and 1 white, or the bright half of [-1, 1]: "
                "say which with value_range=(0, 1) or value_range=(-1, 1); a checkpoint says it by do_normalize, false "
                "or true, in preprocessor_config.json"
            )
        if np.abs(values).max() > _LIMIT:
            raise ValueError(
                f"clusters must lie in [-1, 1]; {found}. Palettes of 0 to 255 are read with value_range=(0, 255)"
            )
        value_range = (-1.0, 1.0)
    black, white = _ends(value_range)
    span = white - black
    if np.allclose(span, span.max(), rtol=1e-9, atol=0):
        weights = np.ones(3)
    else:
        weights = np.round(span / span.max(), 12)  # so that a palette that was saved is equal to itself
    if (black == -1).all() and (white == 1).all():
        unit = values
    else:
        unit = 2 * ((values - black) / span) - 1
    if np.abs(unit).max() > _LIMIT:
        low, high = np.round(black, 4).tolist(), np.round(white, 4).tolist()
        ends = f"[{low[0]:g}, {high[0]:g}]" if len({*low}) == len({*high}) == 1 else f"{low} to {high}"
        raise ValueError(f"clusters must lie in {ends}; {found}")
    return np.ascontiguousarray(unit, dtype=np.float32), weights


def _ends(value_range: Any) -> tuple[np.ndarray, np.ndarray]:
    try:
        black, white = (np.broadcast_to(np.asarray(end, dtype=np.float64), (3,)) for end in value_range)
        fits = bool(np.isfinite(black).all() and np.isfinite(white).all() and (white > black).all())
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(f"value_range must be (black, white) with black below white, not {short(value_range)}")
    return black, white


def _array_of(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]. Transparency and 16-bit values are no business of a palette: whoever has them must decide."""
    if image.mode not in _OPAQUE_MODES or "transparency" in image.info:
        raise ValueError(f"images must be opaque with 8 bits a channel, not mode {image.mode!r}; convert them to RGB")
    return np.asarray(image.convert("RGB"))
