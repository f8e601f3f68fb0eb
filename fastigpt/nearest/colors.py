"""The nearest centroid of each of the 2²⁴ colours, worked out once (csrc/nearest/rgb_table.cpp)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import fastigpt._C as _C
from fastigpt.locks import Lock
from fastigpt.nearest.arrays import Described, address_of, describe, few_axes, require_cuda


class ColorTable:
    """An exact index for uint8 points of three channels whose values stand for other numbers.

    centroids: float64 [K, 3], finite, K at most 65,536. levels: float64 [3, 256]: what a channel's values stand for, in
    rising order. The table is made at the first search.
    """

    def __init__(self, centroids: np.ndarray, levels: np.ndarray) -> None:
        self._centroids, self._levels = np.ascontiguousarray(centroids), np.ascontiguousarray(levels)
        self._table: Any = None
        self._on_device: dict[torch.device, tuple[torch.Tensor, ...]] = {}
        self._lock = Lock()

    def search(self, x: Described, n_threads: int) -> np.ndarray | torch.Tensor:
        """int64 [...] for uint8 [..., 3], on its device: the nearest centroid, the lowest on ties."""
        if x.device.type == "cuda":
            return self._search_on_cuda(x, n_threads)
        indices = np.empty(x.shape[:-1], np.int64)
        self._built(n_threads).lookup(x.address, x.shape, x.strides, address_of(indices), n_threads)
        return indices

    def _search_on_cuda(self, x: Described, n_threads: int) -> torch.Tensor:
        require_cuda()
        assert isinstance(x.owner, torch.Tensor)
        table = self._built(n_threads)
        with self._lock:
            if x.device not in self._on_device:
                parts = (np.frombuffer(table.cells(), np.int32), np.frombuffer(table.blocks(), np.int16))
                self._on_device[x.device] = tuple(torch.tensor(part).to(x.device) for part in parts)
            cells, blocks = self._on_device[x.device]
        data = describe("pixels", few_axes(x.owner.detach()))
        indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream().cuda_stream
            where = cells.data_ptr(), blocks.data_ptr(), indices.data_ptr()
            _C.rgb_lookup_cuda(data.address, data.shape, data.strides, *where, stream)
        return indices

    def _built(self, n_threads: int) -> Any:
        with self._lock:
            if self._table is None:
                book, levels = address_of(self._centroids), address_of(self._levels)
                self._table = _C.RgbTable(book, len(self._centroids), levels, "auto", n_threads)
            return self._table
