"""Nearest centroid: for every point the index of the closest row of a codebook, exactly and without an N × K matrix.

Arrays of any framework come in, indices of the same framework go out. The work is done in csrc/nearest/ and
csrc/cuda/; this file checks what it is given and hands over addresses and strides, so nothing is copied.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch

import fastigpt._C as _C
from fastigpt.operands import readable
from fastigpt.scalars import shown, whole

_DTYPES = ("uint8", "float16", "bfloat16", "float32")
_MAX_CUDA_AXES = 3  # kMaxAxes in csrc/include/fastigpt/nearest_centroid.h


class _Array(NamedTuple):
    """What the extension needs to know of an array. Strides in bytes; `owner` keeps the memory alive."""

    owner: np.ndarray | torch.Tensor
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

    Raises TypeError for a dtype or a kind of array it does not take, ValueError for shapes that do not fit, devices
    that differ, no centroids, or (CPU) values that are not finite and (CPU, cosine) centroids of length zero.
    """
    if not isinstance(metric, str) or metric not in ("l2", "cosine"):
        raise ValueError(f'metric must be "l2" or "cosine", not {shown(metric)}')
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
    run = _on_cuda if x.device.type == "cuda" else _on_cpu
    indices, distances = run(x, book, metric, return_distances, isa, n_threads)
    return (like(points, indices), like(points, distances)) if return_distances else like(points, indices)


def _on_cpu(
    x: _Array, book: _Array, metric: str, return_distances: bool, isa: str, n_threads: int
) -> tuple[np.ndarray, np.ndarray | None]:
    owner = book.owner.detach().float().numpy() if isinstance(book.owner, torch.Tensor) else book.owner
    rows = np.ascontiguousarray(owner, dtype=np.float32)  # every dtype taken is exact in float32
    if not np.isfinite(rows).all():
        where = np.argwhere(~np.isfinite(rows))[0]
        raise ValueError(f"centroids must be finite; found {rows[tuple(where)]} at {where.tolist()}")
    if metric == "cosine" and not rows.any(axis=1).all():
        raise ValueError(
            f"centroids must not be zero under the cosine metric; row {np.flatnonzero(~rows.any(axis=1))[0]} is"
        )
    indices = np.empty(x.shape[:-1], np.int64)
    distances = np.empty(x.shape[:-1], np.float32) if return_distances else None
    bad = _C.nearest_centroid(
        x.address,
        x.dtype,
        x.shape,
        x.strides,
        address_of(rows),
        rows.shape[0],
        metric == "cosine",
        address_of(indices),
        address_of(distances) if distances is not None else 0,
        isa,
        n_threads,
    )
    if bad >= 0:
        where = [int(i) for i in np.unravel_index(bad, x.shape[:-1])]
        raise ValueError(f"points must be finite; the one at {where} is not")
    return indices, distances


def _on_cuda(
    x: _Array, book: _Array, metric: str, return_distances: bool, isa: str, n_threads: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    require_cuda()
    assert isinstance(x.owner, torch.Tensor) and isinstance(book.owner, torch.Tensor)
    tensor, rows = x.owner.detach(), book.owner.detach().float().contiguous()
    if metric == "cosine":
        tensor, rows = _unit(tensor), _unit(rows)
    data = describe("points", few_axes(tensor))
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    distances = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if return_distances else None
    with torch.cuda.device(x.device):
        _C.nearest_centroid_cuda(
            data.address,
            data.dtype,
            data.shape,
            data.strides,
            rows.data_ptr(),
            rows.shape[0],
            indices.data_ptr(),
            distances.data_ptr() if distances is not None else 0,
            torch.cuda.current_stream().cuda_stream,
        )
    return indices, distances


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows divided by their lengths; zero rows stay zero."""
    wide = rows.double()
    return (wide / wide.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).float()


def describe(name: str, array: Any) -> _Array:
    """Address, dtype, shape and strides of an array, uncopied (but for a lazily negated view)."""
    if not isinstance(array, (np.ndarray, torch.Tensor)):
        if hasattr(array, "__cuda_array_interface__"):
            if not torch.cuda.is_available():
                raise ValueError(f"{name} must be on a device that torch sees, which is no CUDA device")
            array = torch.as_tensor(array, device="cuda")
        elif hasattr(array, "__dlpack__"):
            array = torch.from_dlpack(array)
        else:
            raise TypeError(f"{name} must be a numpy array, a torch tensor or the like, not {type(array).__name__}")
    if isinstance(array, np.ndarray):
        dtype = array.dtype.name
        if dtype not in _DTYPES or not array.dtype.isnative:
            raise TypeError(f"{name} must be one of {', '.join(_DTYPES)}, not {array.dtype}; convert with .astype()")
        return _Array(array, address_of(array), dtype, array.shape, array.strides, torch.device("cpu"))
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(_DTYPES)}, not {dtype}; convert with .to()")
    array = readable(name, array)
    strides = tuple(step * array.element_size() for step in array.stride())
    return _Array(array, array.data_ptr(), dtype, tuple(array.shape), strides, array.device)


def address_of(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def few_axes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its points lie on more than the three axes that the CUDA kernels walk along."""
    axes = 0
    outer: int | None = None  # stride that the next axis must fill out to be one run with those before it
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]):
        axes += outer != size * stride
        outer = stride
    return tensor if axes <= _MAX_CUDA_AXES else tensor.contiguous()


def require_cuda() -> None:
    if not _C.has_cuda:
        raise ValueError("points are on a CUDA device, but fastigpt was built without CUDA (nvcc was not found)")


def check_threads(threads: int | None) -> int:
    """threads as the extension wants it: 0 = all cores."""
    return 0 if threads is None else whole("threads", threads, 1, _C.MAX_THREADS, "an int or None")


def like(points: Any, values: Any) -> Any:
    """values, a numpy array or torch tensor, in the framework of points."""
    if isinstance(points, np.ndarray):
        return values
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if isinstance(points, torch.Tensor) or not hasattr(points, "__array_namespace__"):
        return tensor
    return points.__array_namespace__().from_dlpack(tensor)
