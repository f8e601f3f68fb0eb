"""Appending to a key-value cache, in plain PyTorch: the twin of kernels/kv_cache.py."""

from __future__ import annotations

import torch

from fastigpt.kernels.launch import SCALED_TYPES


def quantize_kv_reference(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., head_dim] → (stored as `dtype`, float32 scale [...])."""
    x = x.float()
    largest = x.abs().amax(-1)
    scale = torch.where(largest > 0, largest / SCALED_TYPES[dtype], 1.0)
    x = x / scale[..., None]
    if dtype == torch.int8:
        x = torch.sign(x) * (x.abs() + 0.5).floor()
    return x.to(dtype), scale


def append_kv_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    lanes: torch.Tensor | None = None,
) -> None:
    """k, v: [n, W, n_head, head_dim] → slots[b] … slots[b] + W − 1 of image lanes[b] (None: b) of the caches
    [n, n_head, capacity, head_dim]. A slot of −1 stores nothing, and what is past the capacity is left out."""
    places = range(len(k)) if lanes is None else lanes.tolist()
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        for rows, image, first in zip(x, places, slots.tolist()):
            count = 0 if first < 0 else max(0, min(len(rows), cache.shape[2] - first))
            rows = rows[:count].transpose(0, 1)  # [n_head, count, head_dim]
            if scale is None:
                cache[image, :, first : first + count] = rows.to(cache.dtype)
            else:
                stored, factor = quantize_kv_reference(rows, cache.dtype)
                cache[image, :, first : first + count] = stored
                scale[image, :, first : first + count] = factor
