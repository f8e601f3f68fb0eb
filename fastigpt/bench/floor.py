"""What a pass must move and compute, counted from the shapes, and the time that takes at the machine's limits.

    bytes = weights + n · position · 2 · n_layer · n_embd · bytes of a cached value
    operations = 2 · weights · n · window + 4 · n · window · position · n_embd · n_layer

The larger of the two times is the floor of a pass. Embedding rows are looked up, not read through; they don't count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastigpt.families import image_gpt
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.kernels.launch import SCALED_TYPES


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


def matrix_parameters(config: ImageGPTConfig) -> int:
    """Parameters that every pass reads: all matrices but the embeddings."""
    shapes = image_gpt.spec(config).weight_shapes()
    return sum(shape[0] * shape[1] for name, shape in shapes.items() if name.endswith(".weight"))


def kv_bytes_per_token(config: ImageGPTConfig, kv_dtype: torch.dtype) -> float:
    """Keys and values of one token in all layers. 8-bit caches keep a float32 scale per head beside each."""
    scales = 4.0 * config.n_head if kv_dtype in SCALED_TYPES else 0.0
    return 2.0 * config.n_layer * (config.n_embd * kv_dtype.itemsize + scales)


def pass_floor(
    config: ImageGPTConfig,
    *,
    n: int,
    position: float,
    window: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    bandwidth: float,
    gemm: float,
) -> Floor:
    """The floor of one pass of n images at this position; bandwidth in bytes/s, gemm in operations/s."""
    parameters = matrix_parameters(config)
    moved = parameters * dtype.itemsize + n * position * kv_bytes_per_token(config, kv_dtype)
    computed = 2.0 * parameters * n * window + 4.0 * n * window * position * config.n_embd * config.n_layer
    return Floor(moved, computed, moved / bandwidth, computed / gemm)
