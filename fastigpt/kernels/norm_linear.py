"""RMS norm and a linear layer for few rows: the weights are streamed once, everything else rides along.

y = norm(x) · gain @ weightᵀ + bias, then quick-GELU, or added to a float32 residual stream, or split into q, k, v with
k and v written straight into the cache. The norm's factor is one number per row, so it is applied to the products: one
pass over x and the weights serves both. One row is a stream of multiply-adds, more are a matrix product.

With many rows the layer is bound by arithmetic and cuBLAS is better at it: from `cublas_from` rows of the measured
configuration on, the product is cuBLAS's, between a kernel for the norm and one for what follows. Weights are [out,
in].

The plain twin is in fastigpt/ops/norm_linear.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastigpt.kernels.launch import PLAIN_TYPES, Table, expect, expect_contiguous, settings
from fastigpt.kernels.overlap import begin, overlap


@triton.jit
def _quick_gelu(x):
    return x * tl.sigmoid(1.702 * x)


@triton.jit
def _norm_linear(
    x,  # [rows, K]
    gain,  # [K], used if NORM
    weight,  # [N, K]
    bias,  # [N], used if BIAS
    out,  # [rows, N]; float32 and added to if RESIDUAL; with QKV [rows, N / 3]: q
    k_cache,  # [rows / window, n_head, capacity, head_dim], used if QKV
    v_cache,
    slots,  # int32 [rows / window], used if QKV
    rows,
    window,
    capacity,
    epsilon,
    K: tl.constexpr,
    N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    QKV: tl.constexpr,
    BLOCK_M: tl.constexpr,  # 1: multiply-adds; at least 16: matrix product
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    has_row = row < rows
    has_column = column < N
    at_row = row.to(tl.int64)[:, None] * K
    at_column = column.to(tl.int64)[:, None] * K
    if BLOCK_M == 1:
        square = tl.zeros([BLOCK_K], tl.float32)
        products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k = k0 + tl.arange(0, BLOCK_K)
            inside = k < K
            w = tl.load(weight + at_column + k[None, :], mask=has_column[:, None] & inside[None, :], other=0.0)
            h = tl.load(x + tl.program_id(1).to(tl.int64) * K + k, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                square += h * h
                h *= tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
            products += w.to(tl.float32) * h[None, :]
        acc = tl.sum(products, axis=1)[None, :]
        squares = tl.sum(square, axis=0) + tl.zeros([1], tl.float32)
    else:
        squares = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k = k0 + tl.arange(0, BLOCK_K)
            inside = k < K
            w = tl.load(weight + at_column + k[None, :], mask=has_column[:, None] & inside[None, :], other=0.0)
            h = tl.load(x + at_row + k[None, :], mask=has_row[:, None] & inside[None, :], other=0.0)
            if NORM:
                h = h.to(tl.float32)
                squares += tl.sum(h * h, axis=1)
                h *= tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)[None, :]
            acc = tl.dot(h.to(w.dtype), tl.trans(w), acc, input_precision="ieee")
    if NORM:
        acc *= tl.rsqrt(squares / K + epsilon)[:, None]
    if BIAS:
        acc += tl.load(bias + column, mask=has_column, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = _quick_gelu(acc)

    mask = has_row[:, None] & has_column[None, :]
    if QKV:
        width = N // 3
        part = column // width  # 0: q, 1: k, 2: v
        place = column % width
        first = tl.load(slots + row // window, mask=has_row, other=-1)
        slot = first + row % window
        lane_head = (row // window).to(tl.int64)[:, None] * (width // HEAD_DIM) + (place // HEAD_DIM)[None, :]
        at = (lane_head * capacity + slot[:, None]) * HEAD_DIM + (place % HEAD_DIM)[None, :]
        stored = mask & ((first >= 0) & (slot < capacity))[:, None]
        q_at = row.to(tl.int64)[:, None] * width + place[None, :]
        tl.store(out + q_at, acc.to(out.dtype.element_ty), mask=mask & (part == 0)[None, :])
        tl.store(k_cache + at, acc.to(k_cache.dtype.element_ty), mask=stored & (part == 1)[None, :])
        tl.store(v_cache + at, acc.to(v_cache.dtype.element_ty), mask=stored & (part == 2)[None, :])
    else:
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        if RESIDUAL:
            acc += tl.load(out + at, mask=mask, other=0.0)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _norm(x, gain, out, epsilon, K: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr):
    # One row: out = norm(x) · gain in out's dtype.
    at = tl.program_id(0).to(tl.int64) * K
    k = tl.arange(0, BLOCK_K)
    h = tl.load(x + at + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        h *= tl.rsqrt(tl.sum(h * h, axis=0) / K + epsilon)
        h *= tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + at + k, h.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def _finish(
    y, bias, out, N: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr
):
    # One row of what follows the product y: bias, quick-GELU, sum with the residual stream.
    at = tl.program_id(0).to(tl.int64) * N
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        h = tl.load(y + at + n, mask=n < N, other=0.0).to(tl.float32)
        if BIAS:
            h += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if GELU:
            h = _quick_gelu(h)
        if RESIDUAL:
            h += tl.load(out + at + n, mask=n < N, other=0.0)
        tl.store(out + at + n, h.to(out.dtype.element_ty), mask=n < N)


def rms_norm(x: torch.Tensor, gain: torch.Tensor | None, out: torch.Tensor, epsilon: float) -> torch.Tensor:
    """norm(x) · gain for x [rows, K], in out's dtype; gain None: only the conversion."""
    expect(x.shape == out.shape and (gain is None or gain.shape == x.shape[1:]), "x, gain and out must fit each other")
    expect_contiguous(x=x, gain=gain, out=out)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    _norm[(len(x),)](
        x, x if gain is None else gain, out, epsilon,
        K=width, BLOCK_K=block, NORM=gain is not None, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return out


def finish(
    y: torch.Tensor, out: torch.Tensor, *, bias: torch.Tensor | None = None, gelu: bool = False, residual: bool = False
) -> torch.Tensor:
    """What follows a product y [rows, N]: bias, quick-GELU, and either a store to out or, if `residual`, a sum with
    it.
    """
    expect(y.shape == out.shape, f"out must be {tuple(y.shape)}, not {tuple(out.shape)}")
    expect_contiguous(y=y, out=out, bias=bias)
    width = y.shape[1]
    _finish[(len(y),)](
        y, y if bias is None else bias, out, N=width, BLOCK_N=min(2048, triton.next_power_of_2(width)),
        BIAS=bias is not None, GELU=gelu, RESIDUAL=residual, num_warps=4,
    )  # fmt: skip
    return out


def uses_cublas(rows: int, configs: Table) -> bool:
    """Whether this many rows are better left to cuBLAS, as measured on this GPU family."""
    return rows >= configs["cublas"][0]["from_rows"]


def norm_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    configs: Table,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    gelu: bool = False,
    residual: bool = False,
    kv_cache: tuple[torch.Tensor, torch.Tensor] | None = None,
    slots: torch.Tensor | None = None,
    window: int = 1,
    scratch: torch.Tensor | None = None,
    config: dict[str, Any] | None = None,
) -> torch.Tensor:
    """x [rows, K] → out [rows, N], or with kv_cache q [rows, N / 3].

    weight: [N, K], float32, bfloat16 or float16. gain: [K], None = no norm. residual: out is float32 and is added to.
    kv_cache: (k, v), each [rows / window, n_head, capacity, head_dim], for the fused projection of q, k and v; row r is
    written to slot slots[r // window] + r % window, unless that is −1 or past the capacity. That always takes the
    kernel, and an 8-bit cache cannot be written from here, for its scale needs a whole head: for either, use
    `append_kv`. scratch: at least rows · (K + N) of weight's dtype for the way over cuBLAS, so that a captured graph
    owns its memory.
    """
    rows, width = x.shape
    n = weight.shape[0]
    expect(weight.shape == (n, width), f"weight must be [N, {width}], not {tuple(weight.shape)}")
    expect(weight.dtype in PLAIN_TYPES, f"weight cannot be {weight.dtype}")
    expect(gain is None or gain.shape == (width,), f"gain must be [{width}]")
    expect(bias is None or bias.shape == (n,), f"bias must be [{n}]")
    expect(not residual or out.dtype == torch.float32, "the residual stream is float32")
    expect(out.shape == (rows, n if kv_cache is None else n // 3), f"out cannot be {tuple(out.shape)}")
    expect_contiguous(x=x, weight=weight, out=out, gain=gain, bias=bias, slots=slots)
    if kv_cache is not None:
        expect(slots is not None and slots.dtype == torch.int32, "kv_cache needs slots, int32")
        expect(rows % window == 0, f"rows ({rows}) must be a multiple of window ({window})")
        expect(kv_cache[0].dtype in PLAIN_TYPES, "an 8-bit cache is written by append_kv")
        expect_contiguous(k_cache=kv_cache[0], v_cache=kv_cache[1])
    if config is None and kv_cache is None and uses_cublas(rows, configs):
        return _many_rows(x, weight, out, gain, bias, epsilon, gelu, residual, scratch)

    k_cache, v_cache = kv_cache or (out, out)
    config = config or settings(configs, "norm_linear", rows, weight.dtype)
    block_m = config["block_m"]
    block_k = min(config["block_k"], max(16, triton.next_power_of_2(width)))
    _norm_linear[(triton.cdiv(n, config["block_n"]), triton.cdiv(rows, block_m))](
        x, x if gain is None else gain, weight, x if bias is None else bias, out, k_cache, v_cache,
        x if slots is None else slots, rows, window, k_cache.shape[2] if kv_cache else 0, epsilon,
        K=width, N=n, HEAD_DIM=k_cache.shape[3] if kv_cache else 1, NORM=gain is not None, BIAS=bias is not None,
        GELU=gelu, RESIDUAL=residual, QKV=kv_cache is not None, BLOCK_M=block_m, BLOCK_N=config["block_n"],
        BLOCK_K=block_k, STAGES=config["stages"], num_warps=config["warps"], **overlap(configs),
    )  # fmt: skip
    return out


def _many_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    gain: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    gelu: bool,
    residual: bool,
    scratch: torch.Tensor | None,
) -> torch.Tensor:
    rows, width = x.shape
    n = len(weight)
    if scratch is None:
        scratch = torch.empty(rows * (width + n), dtype=weight.dtype, device=x.device)
    if gain is not None or x.dtype != weight.dtype:
        x = rms_norm(x, gain, scratch[: rows * width].view(rows, width), epsilon)
    if bias is None and not gelu and not residual and out.dtype == weight.dtype:
        return torch.mm(x, weight.T, out=out)
    y = torch.mm(x, weight.T, out=scratch[rows * width : rows * (width + n)].view(rows, n))
    return finish(y, out, bias=bias, gelu=gelu, residual=residual)
