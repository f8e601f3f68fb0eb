"""A table of which only those rows are in memory that somebody has asked for: a model knows 100,000 words, and prompts
have a few of them."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable, Iterable

import numpy as np


class RowsInUse:
    """numbers: [rows, width], zeros in rows that nobody has needed yet. The operating system gives memory to pages that
    are written, so the others take none.

    read: gives row i.
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype, read: Callable[[int], np.ndarray]) -> None:
        self.numbers = _untouched(shape, dtype)
        self._read, self._there, self._lock = read, np.zeros(shape[0], bool), threading.Lock()

    def need(self, ids: Iterable[int]) -> None:
        """Reads the rows that are not there yet. Ids that the table does not have are left for others to refuse."""
        rows = {row for row in ids if 0 <= row < len(self._there)}
        with self._lock:
            for row in sorted(rows):
                if not self._there[row]:
                    self.numbers[row] = self._read(row)
                    self._there[row] = True


def _untouched(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # else the first row of 2 MiB would take them all
    return np.frombuffer(memory, dtype).reshape(shape)
