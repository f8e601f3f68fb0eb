"""The colours an Image GPT draws with: pixels to tokens, tokens to pixels, and palettes made from images.

A palette is what transformers calls `clusters`: float32 [n_colors, 3] in [−1, 1], where a channel value p of 0 … 255
stands at p/127.5 − 1. Encoding is exact; csrc/cpu/quantize_rgb.cpp works out all 2²⁴ colours at the first call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import fastigpt._C as _C
from fastigpt.arguments import plain_tensor
from fastigpt.errors import CheckpointError
from fastigpt.images import as_image_list, on_white
from fastigpt.quantize import address_of, check_threads, describe, few_axes, like, nearest_centroid, require_cuda

MAX_COLORS = 65536
_COUNTED = 1 << 22  # pixels counted at a time
_LIMIT = 1.1  # a k-means centre of colours in [−1, 1] is in there itself; a palette of 0 … 255 is not
_OPAQUE_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class Palette:
    """n_colors colours, their tokens, and the way between them.

    clusters: [n_colors, 3], in [−1, 1], array or tensor; 1 to 65,536 colours. ValueError for another shape, values that
    are not finite, or values far outside [−1, 1].

    Attributes: `clusters`, float32 [n_colors, 3], read-only; `colors`, uint8 [n_colors, 3], read-only,
    clip(rint(127.5 · (clusters + 1)), 0, 255) as in OpenAI's code; `n_colors`.
    """

    def __init__(self, clusters: Any) -> None:
        if isinstance(clusters, torch.Tensor):
            clusters = clusters.detach().cpu().to(torch.float32).numpy()
        try:
            values = np.array(clusters, dtype=np.float32, order="C")
        except (TypeError, ValueError):
            raise ValueError(f"clusters must be numbers of shape [n_colors, 3], not {_short(clusters)}") from None
        if values.ndim != 2 or values.shape[1] != 3 or not 1 <= values.shape[0] <= MAX_COLORS:
            raise ValueError(
                f"clusters must have shape [n_colors, 3] with 1 to {MAX_COLORS} colours, not {list(values.shape)}"
            )
        if not np.isfinite(values).all():
            row = np.flatnonzero(~np.isfinite(values).all(axis=1))[0]
            raise ValueError(f"clusters must be finite; row {row} is {values[row].tolist()}")
        if np.abs(values).max() > _LIMIT:
            raise ValueError(f"clusters must lie in [-1, 1]; found {values.min():g} to {values.max():g}")
        self.clusters = values
        self.clusters.setflags(write=False)
        self.colors = np.clip(np.rint(127.5 * (values + 1)), 0, 255).astype(np.uint8)
        self.colors.setflags(write=False)
        self._table: Any = None
        self._on_device: dict[torch.device, tuple[torch.Tensor, ...]] = {}
        self._lock = threading.Lock()

    @property
    def n_colors(self) -> int:
        return len(self.clusters)

    def __len__(self) -> int:
        return self.n_colors

    def __repr__(self) -> str:
        return f"Palette({self.n_colors} colors)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Palette) and np.array_equal(self.clusters, other.clusters)

    def __hash__(self) -> int:
        return hash((self.clusters + np.float32(0)).tobytes())  # −0 and 0 are equal

    def __reduce__(self) -> tuple[Any, ...]:
        return Palette, (np.array(self.clusters),)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> Palette:
        """Reads a .npy file such as OpenAI's kmeans_centers.npy. CheckpointError (a ValueError) names a bad file."""
        if not Path(path).is_file():
            raise CheckpointError(f"palette file {path} does not exist")
        try:
            values = np.load(path, allow_pickle=False)
            if not isinstance(values, np.ndarray):
                values.close()
                raise ValueError("an archive of arrays, expected one array")
            return cls(values)
        except (ValueError, EOFError, OSError) as error:
            raise CheckpointError(f"palette file {path}: {error}") from None

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
        n_threads = check_threads(threads)
        if isinstance(x.owner, torch.Tensor) and x.device.type == "cuda":
            return like(pixels, self._encode_on_cuda(x.owner, n_threads))
        tokens = np.empty(x.shape[:-1], np.int64)
        self._built(n_threads).lookup(x.address, x.shape, x.strides, address_of(tokens), n_threads)
        return like(pixels, tokens)

    def _encode_on_cuda(self, pixels: torch.Tensor, n_threads: int) -> torch.Tensor:
        require_cuda()
        table = self._built(n_threads)
        with self._lock:
            if pixels.device not in self._on_device:
                parts = (np.frombuffer(table.cells(), np.int32), np.frombuffer(table.blocks(), np.int16))
                self._on_device[pixels.device] = tuple(torch.tensor(part).to(pixels.device) for part in parts)
            cells, blocks = self._on_device[pixels.device]
        x = describe("pixels", few_axes(pixels))
        tokens = torch.empty(x.shape[:-1], dtype=torch.int64, device=pixels.device)
        with torch.cuda.device(pixels.device):
            stream = torch.cuda.current_stream().cuda_stream
            where = cells.data_ptr(), blocks.data_ptr(), tokens.data_ptr()
            _C.rgb_lookup_cuda(x.address, x.shape, x.strides, *where, stream)
        return tokens

    def decode(self, tokens: Any) -> Any:
        """Colours of tokens: integers [...] in 0 … n_colors − 1, numpy array or torch tensor → uint8 [..., 3] of the
        same kind and device. Raises TypeError for another kind or dtype, ValueError for tokens out of range."""
        if isinstance(tokens, torch.Tensor):
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

    def _built(self, n_threads: int) -> Any:
        with self._lock:
            if self._table is None:
                # In units of half a level all is exact: 255 · (p/127.5 − 1) = 2p − 255, and 255 · c fits float64.
                points = 255 * self.clusters.astype(np.float64)
                self._table = _C.RgbTable(address_of(points), self.n_colors, 2.0, -255.0, n_threads)
            return self._table

    @classmethod
    def fit(cls, images: Any, n_colors: int = 512, seed: int = 0) -> Palette:
        """Palette of n_colors by k-means over all pixels of images, seeded by k-means++; the same seed gives the same
        palette.

        images: uint8 [..., 3], array or tensor, or whatever `fastigpt.images.as_image_list` reads (files, PIL images,
        grey ones; transparent parts on white), or a list of such of any sizes. Raises ValueError when there are fewer
        different colours than n_colors, and what `as_image_list` raises.
        """
        if isinstance(n_colors, bool) or not isinstance(n_colors, int) or not 1 <= n_colors <= MAX_COLORS:
            raise ValueError(f"n_colors must be a whole number in 1 … {MAX_COLORS}, not {n_colors!r}")
        colors, counts = _histogram(images)
        if len(colors) < n_colors:
            raise ValueError(f"images have {len(colors)} different colours, fewer than n_colors = {n_colors}")
        rng = np.random.default_rng(seed)
        points = colors.astype(np.float32) / np.float32(127.5) - np.float32(1)
        return cls(_k_means(points, counts.astype(np.float64), n_colors, rng))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _array_of(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]. Transparency and 16-bit values are no business of a palette: whoever has them must decide."""
    if image.mode not in _OPAQUE_MODES or "transparency" in image.info:
        raise ValueError(f"images must be opaque with 8 bits a channel, not mode {image.mode!r}; convert them to RGB")
    return np.asarray(image.convert("RGB"))


def _histogram(images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Different colours, uint8 [n, 3], in rising order, and how often each occurs."""
    total = np.zeros(1 << 24, np.int64)
    waiting: list[np.ndarray] = []  # a count walks over all colours: many small images are counted together
    n_waiting, found = 0, False
    for pixels in _pixels(images):
        found = True
        flat = pixels.reshape(-1, 3)
        for some in np.array_split(flat, max(1, len(flat) // _COUNTED)):
            waiting.append(some)
            n_waiting += len(some)
            if n_waiting >= _COUNTED:
                _count(waiting, total)
                n_waiting = 0
    if not found:
        raise ValueError("images is empty")
    _count(waiting, total)
    packed = np.flatnonzero(total)
    return np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1).astype(np.uint8), total[packed]


def _count(waiting: list[np.ndarray], total: np.ndarray) -> None:
    """Adds the colours of the arrays uint8 [n, 3] to the total and empties the list."""
    if waiting:
        wide = np.concatenate(waiting).astype(np.int32)
        total += np.bincount(wide[:, 0] << 16 | wide[:, 1] << 8 | wide[:, 2], minlength=1 << 24)
        waiting.clear()


def _pixels(images: Any) -> Iterator[np.ndarray]:
    """uint8 [..., 3] of each image."""
    for image in images if isinstance(images, (list, tuple)) else [images]:
        if isinstance(image, torch.Tensor):
            image = plain_tensor("images", image)
        kind = isinstance(image, (np.ndarray, torch.Tensor))
        if kind and image.ndim and image.shape[-1] == 3 and image.dtype in (np.dtype(np.uint8), torch.uint8):
            yield np.asarray(image)
        elif kind and image.ndim == 2 and image.shape[-1] == 3:
            raise TypeError(f"images of shape [n, 3] are colours and must be uint8 (0 … 255), not {image.dtype}")
        else:
            yield from (np.asarray(on_white(picture)) for picture in as_image_list(image))


def _k_means(points: np.ndarray, weights: np.ndarray, k: int, rng: np.random.Generator, steps: int = 100) -> np.ndarray:
    """Lloyd's algorithm on weighted points, float32 [n, d] → float32 [k, d]; stops when no point changes its centre."""
    sample: np.ndarray = np.arange(len(points))
    if len(points) > 1 << 16:
        sample = np.sort(rng.choice(len(points), max(1 << 16, k), replace=False, p=weights / weights.sum()))
    centres = _k_means_plus_plus(points[sample], weights[sample], k, rng)
    labels: np.ndarray = np.full(len(points), -1)
    for _ in range(steps):
        previous = labels
        labels, distances = nearest_centroid(points, centres, return_distances=True)
        if np.array_equal(labels, previous):
            break
        mass = np.bincount(labels, weights, minlength=k)
        sums = np.stack([np.bincount(labels, weights * axis, minlength=k) for axis in points.T], axis=1)
        used = mass > 0
        centres[used] = (sums[used] / mass[used, None]).astype(np.float32)
        if not used.all():  # a centre that lost all its points moves to the one that is served worst
            worst = np.argsort(-distances * weights, kind="stable")
            centres[~used] = points[worst[: k - used.sum()]]
    return centres


def _k_means_plus_plus(points: np.ndarray, weights: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k of the points, each drawn with probability ∝ weight · squared distance to those drawn before
    (Arthur and Vassilvitskii, 2007)."""
    chosen = [int(rng.choice(len(points), p=weights / weights.sum()))]
    distances = np.full(len(points), np.inf, np.float32)
    while len(chosen) < k:
        distances = np.minimum(distances, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        cumulative = np.cumsum(weights * distances)
        # The points are all different, so while fewer than k are chosen some distance is positive.
        chosen.append(int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")))
    return points[chosen]
