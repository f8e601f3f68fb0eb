"""Appends keys and values to a cache, scaling them into 8 bits where the cache is int8 or float8_e4m3.

A cache is [n, n_head, capacity, head_dim], so that one head's keys are one contiguous stream. An 8-bit cache has a
float32 scale for every vector, [n, n_head, capacity]: value = stored · scale. The plain twin is in
fastigpt/ops/kv_cache.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastigpt.kernels.launch import PLAIN_TYPES, SCALED_TYPES, Table, expect, expect_contiguous, row_stride
from fastigpt.kernels.overlap import begin, overlap


@triton.jit
def _store_scaled(x, cache, scale, at, d, stored, HEAD_DIM: tl.constexpr, LIMIT: tl.constexpr, ROUND: tl.constexpr):
    # x: [BLOCK_H, BLOCK_D] float32; at: [BLOCK_H] vector numbers in the cache
    if LIMIT > 0:
        largest = tl.max(tl.abs(x), axis=1)
        factor = tl.where(largest > 0, largest / LIMIT, 1.0)
        tl.store(scale + at, factor, mask=stored)
        x = tl.div_rn(x, factor[:, None] + tl.zeros_like(x))
        if ROUND:  # half away from zero; the largest becomes ±127 exactly
            x = tl.where(x >= 0, tl.floor(x + 0.5), tl.ceil(x - 0.5))
    mask = stored[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(cache + at[:, None] * HEAD_DIM + d[None, :], x.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def _append_kv(
    k,  # [rows, n_head, head_dim], rows `row_stride` apart
    v,
    k_cache,  # [n, n_head, capacity, head_dim]
    v_cache,
    k_scale,  # float32 [n, n_head, capacity], read only if LIMIT
    v_scale,
    slots,  # int32 [n]: slot of each image's first row; -1 = store nothing
    lanes,  # int32 [n]: where in the cache each image is, read only if PLACED
    row_stride,
    capacity,
    WINDOW,  # rows of an image
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LIMIT: tl.constexpr,
    ROUND: tl.constexpr,
    PLACED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0)
    image = row // WINDOW
    first = tl.load(slots + image)
    if PLACED:
        image = tl.load(lanes + image)
    slot = first + row % WINDOW
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    stored = h < tl.where((first >= 0) & (slot < capacity), HEADS, 0)
    source = row.to(tl.int64) * row_stride + h[:, None] * HEAD_DIM + d[None, :]
    mask = stored[:, None] & (d < HEAD_DIM)[None, :]
    at = (image.to(tl.int64) * HEADS + h) * capacity + slot
    keys = tl.load(k + source, mask=mask, other=0.0).to(tl.float32)
    _store_scaled(keys, k_cache, k_scale, at, d, stored, HEAD_DIM, LIMIT, ROUND)
    values = tl.load(v + source, mask=mask, other=0.0).to(tl.float32)
    _store_scaled(values, v_cache, v_scale, at, d, stored, HEAD_DIM, LIMIT, ROUND)


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    lanes: torch.Tensor | None = None,
    *,
    configs: Table | None = None,
) -> None:
    """k, v: [n, W, n_head, head_dim] (rows may be apart, as in a fused qkv) → slots[b] … slots[b] + W − 1 of image b.

    slots: int32 [n]; −1 stores nothing, slots at or past the capacity are left out. lanes: int32 [n], where in a cache
    of any number of images each one is; None: in this order. configs: say whether launches overlap; None: they do not.
    """
    n, window, n_head, head_dim = k.shape
    capacity = k_cache.shape[2]
    stride = row_stride("k", k)
    expect(k.shape == v.shape and row_stride("v", v) == stride, "k and v must have one shape and one layout")
    n_lanes = n if lanes is None else len(k_cache)
    expect(
        k_cache.shape == v_cache.shape == (n_lanes, n_head, capacity, head_dim),
        f"caches must be {(n_lanes, n_head, '…', head_dim)}",
    )
    expect(lanes is None or (lanes.dtype == torch.int32 and lanes.shape == (n,)), "lanes must be int32 [n]")
    expect(slots.dtype == torch.int32 and slots.shape == (n,), "slots must be int32 [n]")
    expect_contiguous(k_cache=k_cache, v_cache=v_cache, slots=slots, lanes=lanes, k_scale=k_scale, v_scale=v_scale)
    scaled = k_cache.dtype in SCALED_TYPES
    expect(scaled or k_cache.dtype in PLAIN_TYPES, f"a cache cannot be {k_cache.dtype}")
    expect(scaled == (k_scale is not None) == (v_scale is not None), "scales go with an 8-bit cache, and only with one")
    _append_kv[(n * window,)](
        k, v, k_cache, v_cache, k_scale if scaled else k_cache, v_scale if scaled else v_cache, slots,
        slots if lanes is None else lanes, stride, capacity, window, HEADS=n_head, HEAD_DIM=head_dim,
        BLOCK_H=triton.next_power_of_2(n_head), BLOCK_D=triton.next_power_of_2(head_dim),
        LIMIT=SCALED_TYPES.get(k_cache.dtype, 0.0), ROUND=k_cache.dtype == torch.int8, PLACED=lanes is not None,
        num_warps=4, **overlap(configs or {}),
    )  # fmt: skip
