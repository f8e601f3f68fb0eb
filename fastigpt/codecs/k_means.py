"""Palettes from images: the different colours of images, and k-means over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastigpt.arguments import plain_tensor
from fastigpt.images import as_image_list, on_white
from fastigpt.nearest import NearestCentroid

_COUNTED = 1 << 22  # pixels counted at a time


def histogram(images: Any) -> tuple[np.ndarray, np.ndarray]:
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


def k_means(points: np.ndarray, weights: np.ndarray, k: int, rng: np.random.Generator, steps: int = 100) -> np.ndarray:
    """Lloyd's algorithm on weighted points, float32 [n, d] → float32 [k, d]; stops when no point changes its centre."""
    sample: np.ndarray = np.arange(len(points))
    if len(points) > 1 << 16:
        sample = np.sort(rng.choice(len(points), max(1 << 16, k), replace=False, p=weights / weights.sum()))
    centres = _k_means_plus_plus(points[sample], weights[sample], k, rng)
    labels: np.ndarray = np.full(len(points), -1)
    for _ in range(steps):
        previous = labels
        labels, distances = NearestCentroid(centres).search(points, return_distances=True)
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
