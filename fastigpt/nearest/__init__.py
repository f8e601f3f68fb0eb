"""Nearest centroid: for every point the index of the closest row of a codebook, exactly and without an N × K matrix.

Arrays of any framework come in, indices of the same framework go out. The work is done in csrc/nearest/ and
csrc/cuda/. `NearestCentroid` is a codebook made ready for many searches, and `nearest_centroid` the same as a function,
which keeps the last few of them.
"""

from __future__ import annotations

from typing import Any

from fastigpt.locks import Lock
from fastigpt.nearest.arrays import address_of, check_threads, describe, few_axes, like, require_cuda
from fastigpt.nearest.colors import ColorTable
from fastigpt.nearest.index import Metric, NearestCentroid, check_metric, rows_of, search

__all__ = [
    "ColorTable",
    "NearestCentroid",
    "address_of",
    "check_threads",
    "describe",
    "few_axes",
    "like",
    "nearest_centroid",
    "require_cuda",
]

_KEPT, _KEPT_BYTES = 8, 256 << 20
_recent: tuple[NearestCentroid, ...] = ()  # the last one used comes first
_lock = Lock()


def nearest_centroid(
    points: Any,
    centroids: Any,
    *,
    metric: Metric = "l2",
    return_distances: bool = False,
    isa: str = "auto",
    threads: int | None = None,
) -> Any:
    """Index of the nearest centroid of every point.

    points: [..., D], uint8, float16, bfloat16 or float32, of any strides, read in place: numpy arrays, torch tensors on
    the CPU or on CUDA, and whatever else has `__dlpack__` or `__cuda_array_interface__`. centroids: [K, D] of the same
    dtypes, on the same device. metric: "l2", or "cosine": points and centroids are divided by their lengths first (in
    float64, rounded to float32), as VQ models with l2-normalised codebooks do; a point of length zero then gets index 0
    and distance 1. isa: "auto" or one of `_C.supported_isas()`; threads: None = all cores. Both are the CPU's; neither
    changes the result.

    Returns int64 [...], of the framework of `points` (a torch tensor where that framework cannot take DLPack); with
    return_distances also the squared distances, float32 [...].

    The result is exact: the argmin of Σ (x − c)² in real arithmetic on the values as stored, ties to the lowest index,
    as numpy's argmin has it. (Distances are compared in float64, and without rounding where float64 cannot separate
    them.) Distances are the float64 sum rounded to float32; above 3.4e38 they are infinite. On CUDA float64 has
    the last word, the cosine metric normalises a copy, and the work is enqueued on torch's current stream without
    waiting, so that values which are not finite cannot raise: such points get index −1 and distance NaN, and such
    centroids are never the nearest.

    On the CPU the codebooks of the last calls, at most 8 and 256 MiB with all that was made of them, are kept ready and
    told by their content, which every call compares: a codebook changed in place is another one. `NearestCentroid`
    spares that comparison.

    Raises TypeError for a dtype or a kind of array it does not take, ValueError for shapes that do not fit, devices
    that differ, no centroids, or (CPU) values that are not finite and (CPU, cosine) centroids of length zero.
    """
    check_metric(metric)
    n_threads = check_threads(threads)
    x, book = describe("points", points), describe("centroids", centroids)
    if len(x.shape) == 0 or x.shape[-1] == 0:
        raise ValueError(f"points must have shape [..., D] with D of at least 1, not {list(x.shape)}")
    if len(book.shape) != 2 or 0 in book.shape:
        raise ValueError(f"centroids must have shape [K, D] with K of at least 1, not {list(book.shape)}")
    if book.shape[1] != x.shape[-1]:
        raise ValueError(
            f"points and centroids must agree in their last dimension: {list(x.shape)} and {list(book.shape)}"
        )
    if book.device != x.device:
        raise ValueError(f"points are on {x.device} and centroids on {book.device}; they must be on one device")
    if x.device.type == "cuda":
        return search(NearestCentroid(book.owner, metric=metric), points, x, return_distances, isa, n_threads)
    address, rows = rows_of(book)
    for index in _recent:
        if index.holds(address, book.shape, metric):
            break
    else:
        index = NearestCentroid(rows if rows is not None else book.owner, metric=metric)
    found = search(index, points, x, return_distances, isa, n_threads)
    if not _recent or index is not _recent[0] or index.nbytes > _KEPT_BYTES:
        _keep(index)
    return found


def _keep(index: NearestCentroid) -> None:
    """Puts an index first, and lets go of those that are too many or too large."""
    global _recent
    with _lock:
        kept: list[NearestCentroid] = []
        room = _KEPT_BYTES
        for known in (index, *(other for other in _recent if other is not index)):
            room -= known.nbytes
            if len(kept) < _KEPT and room >= 0:
                kept.append(known)
        _recent = tuple(kept)
