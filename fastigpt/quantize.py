"""Nearest centroid: for every point the index of the closest row of a codebook, exactly and without an N × K matrix.

Arrays of any framework come in, indices of the same framework go out. The work is done in csrc/cpu/quantize.cpp; this
file checks what it is given and hands over addresses and strides, so that no input is copied.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch

import fastigpt._C as _C

_DTYPES = ("uint8", "float16", "bfloat16", "float32")


class _Array(NamedTuple):
    """What the extension needs to know of an array. Strides in bytes; `owner` keeps the memory alive."""

    owner: Any
    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device


def nearest_centroid(
    points: Any,
    centroids: Any,
    *,
    metric: Literal["l2", "cosine"] = "l2",
    return_distances: bool = False,
    isa: str = "auto",
    threads: int | None = None,
) -> Any:
    """Index of the nearest centroid of every point.

    points: [..., D], uint8, float16, bfloat16 or float32; numpy arrays or torch tensors of any strides, read in place.
    centroids: [K, D] of the same dtypes. metric: "l2", or "cosine": points and centroids are divided by their lengths
    first (in float64, rounded to float32), as VQ models with l2-normalised codebooks do; a point of length zero then
    gets index 0 and distance 1. isa: "auto" or one of `_C.supported_isas()`; threads: None = all cores. Neither changes
    the result.

    Returns int64 [...], of the framework of `points`; with return_distances also the squared distances, float32 [...].

    The result is exact: the argmin of Σ (x − c)² in real arithmetic on the values as stored, ties to the lowest index,
    as numpy's argmin has it. (Distances are compared in float64, and in twice that precision where float64 cannot
    separate them.) Distances are the float64 sum rounded to float32; above 3.4e38 they are infinite.

    Raises TypeError for a dtype or a kind of array it does not take, ValueError for shapes that do not fit, no
    centroids, or values that are not finite.
    """
    if metric not in ("l2", "cosine"):
        raise ValueError(f'metric must be "l2" or "cosine", not {metric!r}')
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

    rows = as_float32(book)
    check_finite("centroids", rows)
    if metric == "cosine":
        zero = np.flatnonzero(~rows.any(axis=1))
        if zero.size:
            raise ValueError(f"centroids must not be zero under the cosine metric; row {zero[0]} is")
    indices = np.empty(x.shape[:-1], np.int64)
    distances = np.empty(x.shape[:-1], np.float32) if return_distances else None
    bad = _C.nearest_centroid(
        x.address,
        x.dtype,
        x.shape,
        x.strides,
        rows.ctypes.data,
        rows.shape[0],
        metric == "cosine",
        indices.ctypes.data,
        distances.ctypes.data if distances is not None else 0,
        isa,
        n_threads,
    )
    if bad >= 0:
        where = [int(i) for i in np.unravel_index(bad, x.shape[:-1])]
        raise ValueError(f"points must be finite; the one at {where} is not")
    found = like(points, indices)
    return (found, like(points, distances)) if return_distances else found


def describe(name: str, array: Any) -> _Array:
    """Address, dtype, shape and strides of a numpy array or torch tensor, uncopied."""
    if isinstance(array, np.ndarray):
        dtype = array.dtype.name
        if dtype not in _DTYPES or not array.dtype.isnative:
            raise TypeError(f"{name} must be one of {', '.join(_DTYPES)}, not {array.dtype}")
        return _Array(
            array, array.__array_interface__["data"][0], dtype, array.shape, array.strides, torch.device("cpu")
        )
    if isinstance(array, torch.Tensor):
        dtype = str(array.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise TypeError(f"{name} must be one of {', '.join(_DTYPES)}, not {dtype}")
        if array.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, not {array.layout}")
        if array.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, not on {array.device}")
        strides = tuple(step * array.element_size() for step in array.stride())
        return _Array(array, array.data_ptr(), dtype, tuple(array.shape), strides, array.device)
    raise TypeError(f"{name} must be a numpy array or a torch tensor, not {type(array).__name__}")


def as_float32(array: _Array) -> np.ndarray:
    """The values as a C-contiguous float32 numpy array; every dtype taken is exact in float32."""
    owner = array.owner
    if isinstance(owner, torch.Tensor):
        owner = owner.detach().to(torch.float32).numpy()
    return np.ascontiguousarray(owner, dtype=np.float32)


def check_finite(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        where = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"{name} must be finite; found {values[tuple(where)]} at {where.tolist()}")


def check_threads(threads: int | None) -> int:
    """threads as the extension wants it: 0 = all cores."""
    if threads is None:
        return 0
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be a whole number of at least 1 or None, not {threads!r}")
    return threads


def like(points: Any, values: np.ndarray | None) -> Any:
    """values in the framework of points."""
    return torch.from_numpy(values) if isinstance(points, torch.Tensor) and values is not None else values
