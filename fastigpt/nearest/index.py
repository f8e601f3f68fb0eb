"""A codebook made ready for many searches."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

import fastigpt._C as _C
from fastigpt.nearest.arrays import Described, address_of, check_threads, describe, few_axes, like, require_cuda
from fastigpt.scalars import shown

Metric = Literal["l2", "cosine"]


class NearestCentroid:
    """An exact index of centroids: built once, searched as often as one likes, from any number of threads at once.

    centroids: [K, D], uint8, float16, bfloat16 or float32, of any kind that `nearest_centroid` takes; copied. metric:
    "l2" or "cosine", as for `nearest_centroid`. Points must be on the device of the centroids.

    On the CPU more is made of the centroids as searches show that it pays (a grid, a tree, a table of all colours, int8
    copies); the results are the same, bit for bit, whatever there is. An index can be pickled and copied: its centroids
    are.

    Raises what `nearest_centroid` raises for its centroids.

    Attributes: `n_centroids`, `dim`, `metric`, `device` (a torch.device), `nbytes`: memory that it takes by now.
    """

    def __init__(self, centroids: Any, *, metric: Metric = "l2") -> None:
        self.metric: Metric = check_metric(metric)
        book = describe("centroids", centroids)
        if len(book.shape) != 2 or 0 in book.shape:
            raise ValueError(f"centroids must have shape [K, D] with K of at least 1, not {list(book.shape)}")
        self.n_centroids, self.dim = book.shape
        self.device = book.device
        self._index: Any = None
        self._rows: torch.Tensor | None = None
        if self.device.type == "cuda":
            require_cuda()
            assert isinstance(book.owner, torch.Tensor)
            self._rows = _unit(book.owner.detach()) if metric == "cosine" else book.owner.detach().float().contiguous()
            return
        address, rows = rows_of(book)
        rows = rows if rows is not None else _float32(book)
        if not np.isfinite(rows).all():
            where = np.argwhere(~np.isfinite(rows))[0]
            raise ValueError(f"centroids must be finite; found {rows[tuple(where)]} at {where.tolist()}")
        if metric == "cosine" and not rows.any(axis=1).all():
            raise ValueError(
                f"centroids must not be zero under the cosine metric; row {np.flatnonzero(~rows.any(axis=1))[0]} is"
            )
        self._index = _C.CentroidIndex(address, *book.shape, metric == "cosine")

    @property
    def nbytes(self) -> int:
        return self._index.nbytes if self._rows is None else self._rows.nbytes

    def __len__(self) -> int:
        return self.n_centroids

    def __repr__(self) -> str:
        return f"NearestCentroid({self.n_centroids} centroids of {self.dim}, {self.metric}, {self.device})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_of, (self._copy(), self.metric)

    def _copy(self) -> Any:
        if self._rows is not None:
            return self._rows
        rows = np.empty((self.n_centroids, self.dim), np.float32)
        self._index.copy(address_of(rows))
        return rows

    def holds(self, address: int, shape: tuple[int, ...], metric: str) -> bool:
        """Was this index made, on the CPU, of just these float32 rows, at `address` without gaps?"""
        return (
            self._index is not None
            and (self.n_centroids, self.dim) == shape
            and self.metric == metric
            and self._index.holds(address)
        )

    def search(
        self, points: Any, *, return_distances: bool = False, isa: str = "auto", threads: int | None = None
    ) -> Any:
        """Index of the nearest centroid of every point: what `nearest_centroid(points, centroids, metric=…)` returns,
        for the same arguments.

        points: [..., D] of any kind, dtype and strides that it takes. Returns int64 [...], with return_distances also
        the squared distances, float32 [...]. Raises TypeError and ValueError as it does.
        """
        n_threads = check_threads(threads)
        x = describe("points", points)
        if len(x.shape) == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"points must have shape [..., {self.dim}], not {list(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"points are on {x.device} and centroids on {self.device}; they must be on one device")
        return search(self, points, x, return_distances, isa, n_threads)


def check_metric(metric: Any) -> Any:
    if not isinstance(metric, str) or metric not in ("l2", "cosine"):
        raise ValueError(f'metric must be "l2" or "cosine", not {shown(metric)}')
    return metric


def rows_of(book: Described) -> tuple[int, np.ndarray | None]:
    """Address of the float32 rows without gaps, and the copy that holds them where they had to be made."""
    size = 4 * book.shape[1]
    if book.dtype == "float32" and book.strides == (size, 4):
        return book.address, None
    rows = _float32(book)
    return address_of(rows), rows


def _float32(book: Described) -> np.ndarray:
    """float32 [K, D], contiguous; every dtype that is taken is exact in it."""
    owner = book.owner.detach().float().numpy() if isinstance(book.owner, torch.Tensor) else book.owner
    return np.ascontiguousarray(owner, dtype=np.float32)


def search(index: NearestCentroid, points: Any, x: Described, return_distances: bool, isa: str, n_threads: int) -> Any:
    """points, of which `x` is the description, have been checked against the index."""
    run = _on_cpu if index._rows is None else _on_cuda
    indices, distances = run(index, x, return_distances, isa, n_threads)
    return (like(points, indices), like(points, distances)) if return_distances else like(points, indices)


def _on_cpu(
    index: NearestCentroid, x: Described, return_distances: bool, isa: str, n_threads: int
) -> tuple[np.ndarray, np.ndarray | None]:
    indices = np.empty(x.shape[:-1], np.int64)
    distances = np.empty(x.shape[:-1], np.float32) if return_distances else None
    bad = index._index.search(
        x.address,
        x.dtype,
        x.shape,
        x.strides,
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
    index: NearestCentroid, x: Described, return_distances: bool, isa: str, n_threads: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows = index._rows
    assert isinstance(x.owner, torch.Tensor) and rows is not None
    tensor = x.owner.detach()
    data = describe("points", few_axes(_unit(tensor) if index.metric == "cosine" else tensor))
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


def _made_of(centroids: Any, metric: Metric) -> NearestCentroid:
    return NearestCentroid(centroids, metric=metric)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows divided by their lengths; zero rows stay zero."""
    wide = rows.double()
    return (wide / wide.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).float()
