"""What a pass must move and compute, counted from the shapes, and the time that takes at the machine's limits.

    bytes = weights + n · position · 2 · n_layer · width of all key heads · bytes of a cached value
    operations = 2 · weights · n · window + 4 · n · window · position · width of all heads · n_layer

The larger of the two times is the floor of a pass. Embedding rows are looked up, not read through; they don't count.
A guided image is two sequences, n counts both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastigpt.kernels.launch import SCALED_TYPES
from fastigpt.spec import ModelSpec


@dataclass(frozen=True)
class Floor:
    """bytes and operations of a pass, and the seconds each takes at the machine's limits."""

    bytes: float
    operations: float
    memory_seconds: float
    compute_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds)


def matrix_parameters(spec: ModelSpec) -> int:
    """Parameters that every pass reads: all matrices but the embeddings."""
    return sum(shape[0] * shape[1] for name, shape in spec.weight_shapes().items() if name.endswith(".weight"))


def parameters(spec: ModelSpec) -> int:
    """All of them."""
    return sum(math.prod(shape) for shape in spec.weight_shapes().values())


def kv_bytes_per_token(spec: ModelSpec, kv_dtype: torch.dtype) -> float:
    """Keys and values of one token in all layers. 8-bit caches keep a float32 scale per head beside each."""
    _, keys, values = spec.block.sections
    scales = 2 * 4.0 * spec.block.n_kv_head if kv_dtype in SCALED_TYPES else 0.0
    return spec.n_layer * ((keys + values) * kv_dtype.itemsize + scales)


def pass_floor(
    spec: ModelSpec,
    *,
    n: int,
    position: float,
    window: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    bandwidth: float,
    gemm: float,
) -> Floor:
    """The floor of one pass of n sequences at this position; bandwidth in bytes/s, gemm in operations/s."""
    read = matrix_parameters(spec)
    moved = read * dtype.itemsize + n * position * kv_bytes_per_token(spec, kv_dtype)
    computed = 2.0 * read * n * window + 4.0 * n * window * position * spec.block.sections[0] * spec.n_layer
    return Floor(moved, computed, moved / bandwidth, computed / gemm)
