"""Holds nearest_centroid to a float64 brute force over ten million points of each kind. Run by hand, some minutes:

    python benchmarks/exact_nearest_centroid.py [points, in millions] [kinds …]

Every index that differs must be at a distance equal in float64 up to its rounding, and then the lower one where all is
integers. Distances must be the float64 distance rounded to float32.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from fastigpt.nearest import NearestCentroid

Make = Callable[[np.random.Generator, int], np.ndarray]


def normal(dim: int) -> Make:
    return lambda rng, n: rng.standard_normal((n, dim)).astype(np.float32)


def unit(dim: int) -> Make:
    def make(rng: np.random.Generator, n: int) -> np.ndarray:
        rows = rng.standard_normal((n, dim))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    return make


def colors(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, 256, (n, 3), dtype=np.uint8)


def floats(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.uniform(-1, 1, (n, 3)).astype(np.float32)


# points, centroids, how many of these
KINDS: dict[str, tuple[Make, Make, int]] = {
    "uint8 colours, 512 of uint8": (colors, colors, 512),
    "uint8 colours, 512 of float32": (colors, lambda rng, n: rng.uniform(0, 255, (n, 3)).astype(np.float32), 512),
    "float32 colours, 512": (floats, floats, 512),
    "4 dimensions, 4096": (normal(4), normal(4), 4096),
    "8 dimensions, 4096": (normal(8), normal(8), 4096),
    "8 dimensions on a sphere, 4096": (unit(8), unit(8), 4096),
    "uint8 of 27 dimensions, 256": (
        lambda rng, n: rng.integers(0, 8, (n, 27), dtype=np.uint8),
        lambda rng, n: rng.integers(0, 8, (n, 27), dtype=np.uint8),
        256,
    ),
    "256 dimensions, 256": (normal(256), normal(256), 256),
}
CHUNK, SCORES = 16384, 1 << 17  # points of a search; scores that the brute force has in cache


def compare(points: np.ndarray, centroids: np.ndarray, index: NearestCentroid) -> tuple[int, int]:
    """How many indices differ from the brute force, and how many of those it has wrong in real terms."""
    found, distances = index.search(points, return_distances=True)
    x, c = points.astype(np.float64), centroids.astype(np.float64)
    squares, columns, rows = (c**2).sum(axis=1), np.ascontiguousarray(-2 * c.T), max(8, SCORES // len(c))
    brute = np.concatenate([(x[i : i + rows] @ columns + squares).argmin(axis=1) for i in range(0, len(x), rows)])
    mine = ((x - c[found]) ** 2).sum(axis=1)
    np.testing.assert_array_max_ulp(distances, mine.astype(np.float32), 1)
    at = np.flatnonzero(found != brute)
    theirs = ((x[at] - c[brute[at]]) ** 2).sum(axis=1)
    integers = points.dtype == centroids.dtype == np.uint8
    if integers:  # all sums are exact
        bad = (mine[at] > theirs) | ((mine[at] == theirs) & (found[at] > brute[at]))
    else:
        bad = mine[at] > theirs * (1 + 1e-15 * x.shape[1])
    return len(at), int(bad.sum())


def main() -> None:
    millions = float(sys.argv[1]) if len(sys.argv) > 1 else 10
    n = int(millions * 1e6)
    for name, (make_points, make_centroids, k) in KINDS.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        rng = np.random.default_rng(26)
        centroids = make_centroids(rng, k)
        index, differ, wrong, start = NearestCentroid(centroids), 0, 0, time.perf_counter()
        for first in range(0, n, CHUNK):
            one = compare(make_points(rng, min(CHUNK, n - first)), centroids, index)
            differ, wrong = differ + one[0], wrong + one[1]
        print(
            f"{name}: {n:,} points, {differ} differ from argmin, {wrong} wrong; {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        assert wrong == 0


if __name__ == "__main__":
    main()
