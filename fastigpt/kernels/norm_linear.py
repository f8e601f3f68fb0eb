"""RMS norm and a linear layer for few rows: the weights are streamed once, everything else rides along.

y = norm(x) · gain @ weightᵀ + bias, then an activation, or added to a float32 residual stream, or split into q, k, v,
which rotary positions turn, with k and v written straight into the cache. The norm's factor is one number per row, so
it is applied to the products: one pass over x and the weights serves both. With many rows every program would repeat
the norm of its rows, and a kernel of its own makes it (`apart`, kernels/norm_rows.py). What a row comes to depends on
no other row and on no launch configuration: kernels/products.py. Weights are [out, in].

With many rows the layer is bound by arithmetic and cuBLAS is better at it: from as many rows on as the measured
configuration says, the product is cuBLAS's, between a kernel for the norm and one for what follows. How that sums is
its own affair, so nothing that tokens are drawn from goes there (`exact`). Weights may be int8 with a scale for each
output, which is applied to the products as well.

The plain twin is in fastigpt/ops/norm_linear.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastigpt.kernels.activations import activate, turn
from fastigpt.kernels.launch import PLAIN_TYPES, Table, expect, expect_contiguous, settings
from fastigpt.kernels.norm_rows import norm_rows
from fastigpt.kernels.overlap import begin, overlap
from fastigpt.kernels.pairs import Activation, Turns
from fastigpt.kernels.products import FIRST, SLICES, load_gain, load_weights, prefetch_weights, sum_products


@triton.jit
def _norm_linear(
    x,  # [rows, K]
    gain,  # [K], used if NORM
    weight,  # [N, K]
    weight_scale,  # float32 [N], used if SCALED
    row_scale,  # float32 [rows], the norm's factor of each, used if APART
    bias,  # [N], used if BIAS
    out,  # [rows, N], or N / 2 if gated; float32 and added to if RESIDUAL; with KV q: [rows, N - 2 KV]
    k_cache,  # [rows / window, n_kv_head, capacity, head_dim], used if KV
    v_cache,
    slots,  # int32 [rows / window], used if KV
    turns,  # float32 [positions, HEAD_DIM / 2, 2], used if TURNED
    starts,  # int32 [turn_lanes], likewise
    positions,
    turn_window,
    turn_lanes,
    rows,
    window,
    capacity,
    epsilon,
    K: tl.constexpr,
    N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    APART: tl.constexpr,  # whether x is what norm_rows made
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    KV: tl.constexpr,  # columns that are k, and after them v, if those go into a cache; else 0
    TURNED: tl.constexpr,  # columns that rotary positions turn
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,  # whether the first weights are loaded before the wait
    OVERLAP: tl.constexpr,
):
    # What no kernel of a pass writes comes before the wait; then the little that is needed at the end, then the rest.
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    has_row = row < rows
    has_column = column < N
    w_first, g_first = 0.0, 0.0
    if EARLY:
        w_first = load_weights(weight, column, has_column, 0, K, FIRST)
    if OVERLAP and K > SLICES * FIRST:
        mine = has_column & (tl.program_id(1) == 0)
        prefetch_weights(weight, column, mine, FIRST if EARLY else 0, K, K // SLICES)
    if EARLY and NORM:
        g_first = load_gain(gain, 0, K, FIRST)
    if BIAS:
        shift = tl.load(bias + column, mask=has_column, other=0.0).to(tl.float32)
    if SCALED:
        factor = tl.load(weight_scale + column, mask=has_column, other=0.0)
    begin(OVERLAP)
    OUT: tl.constexpr = N // 2 if ACTIVATION == "gated_silu" else N
    BLOCK_OUT: tl.constexpr = BLOCK_N * OUT // N
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask = has_row[:, None] & (output < OUT)[None, :]
    at = row.to(tl.int64)[:, None] * OUT + output[None, :]
    if KV > 0:
        first = tl.load(slots + row // window, mask=has_row, other=-1)
    if RESIDUAL:
        before = tl.load(out + at, mask=mask, other=0.0)
    if APART:
        norm = tl.load(row_scale + row, mask=has_row, other=0.0)
    acc, squares = sum_products(
        x,
        gain,
        weight,
        row,
        has_row,
        column,
        has_column,
        w_first,
        g_first,
        K,
        NORM,
        BLOCK_K,
        STAGES,
        EARLY,
        # int8 becomes whichever of x and out is not the float32 residual stream.
        (out if NORM else x).dtype.element_ty if SCALED else weight.dtype.element_ty,
    )
    if NORM:
        acc *= tl.rsqrt(squares / K + epsilon)[:, None]
    if APART:
        acc *= norm[:, None]
    if SCALED:
        acc *= factor[None, :]
    if BIAS:
        acc += shift[None, :]
    if TURNED > 0:
        first_column = tl.program_id(0) * BLOCK_N
        acc = turn(acc, row, has_row, first_column, turns, starts, positions, turn_window, turn_lanes, TURNED, HEAD_DIM)
    acc = activate(acc, ACTIVATION)
    if KV > 0:
        Q: tl.constexpr = N - 2 * KV
        place = (column + (KV - Q % KV) % KV) % KV  # within k or v
        slot = first + row % window
        lane_head = (row // window).to(tl.int64)[:, None] * (KV // HEAD_DIM) + (place // HEAD_DIM)[None, :]
        stored_at = (lane_head * capacity + slot[:, None]) * HEAD_DIM + (place % HEAD_DIM)[None, :]
        stored = mask & ((first >= 0) & (slot < capacity))[:, None]
        q_at = row.to(tl.int64)[:, None] * Q + column[None, :]
        is_k = (column >= Q) & (column < Q + KV)
        tl.store(out + q_at, acc.to(out.dtype.element_ty), mask=mask & (column < Q)[None, :])
        tl.store(k_cache + stored_at, acc.to(k_cache.dtype.element_ty), mask=stored & is_k[None, :])
        tl.store(v_cache + stored_at, acc.to(v_cache.dtype.element_ty), mask=stored & (column >= Q + KV)[None, :])
    else:
        if RESIDUAL:
            acc += before
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _norm(x, gain, out, epsilon, K: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr):
    # One row: out = norm(x) · gain in out's dtype.
    at = tl.program_id(0).to(tl.int64) * K
    k = tl.arange(0, BLOCK_K)
    if NORM:
        factor = tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
    begin(OVERLAP)
    h = tl.load(x + at + k, mask=k < K, other=0.0).to(tl.float32)
    if NORM:
        h *= tl.rsqrt(tl.sum(h * h, axis=0) / K + epsilon)
        h *= factor
    tl.store(out + at + k, h.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def _finish(
    y, weight_scale, bias, out, turns, starts, positions, turn_window, turn_lanes, N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr, TURNED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # One row of what follows the product y: scale, bias, turning or activation, sum with the residual stream.
    begin(OVERLAP)
    row = tl.program_id(0) + tl.arange(0, 1)
    OUT: tl.constexpr = N // 2 if ACTIVATION == "gated_silu" else N
    BLOCK_OUT: tl.constexpr = BLOCK_N * OUT // N
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)[None, :]
        h = tl.load(y + row.to(tl.int64)[:, None] * N + n, mask=n < N, other=0.0).to(tl.float32)
        if SCALED:
            h *= tl.load(weight_scale + n, mask=n < N, other=0.0)
        if BIAS:
            h += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if TURNED > 0:
            h = turn(h, row, row >= 0, n0, turns, starts, positions, turn_window, turn_lanes, TURNED, HEAD_DIM)
        h = activate(h, ACTIVATION)
        n = n0 * OUT // N + tl.arange(0, BLOCK_OUT)[None, :]
        at = row.to(tl.int64)[:, None] * OUT + n
        if RESIDUAL:
            h += tl.load(out + at, mask=n < OUT, other=0.0)
        tl.store(out + at, h.to(out.dtype.element_ty), mask=n < OUT)


def rms_norm(
    x: torch.Tensor, gain: torch.Tensor | None, out: torch.Tensor, epsilon: float, *, configs: Table | None = None
) -> torch.Tensor:
    """norm(x) · gain for x [rows, K], in out's dtype; gain None: only the conversion. configs: say whether launches
    overlap; None: they do not."""
    expect(x.shape == out.shape and (gain is None or gain.shape == x.shape[1:]), "x, gain and out must fit each other")
    expect_contiguous(x=x, gain=gain, out=out)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    _norm[(len(x),)](
        x, x if gain is None else gain, out, epsilon,
        K=width, BLOCK_K=block, NORM=gain is not None, num_warps=4 if block <= 2048 else 8,
        **overlap(configs or {}),
    )  # fmt: skip
    return out


def finish(
    y: torch.Tensor,
    out: torch.Tensor,
    *,
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    turns: Turns | None = None,
    activation: Activation | None = None,
    residual: bool = False,
    configs: Table | None = None,
) -> torch.Tensor:
    """What follows a product y [rows, N]: scale, bias, turns, activation, and a store to out or, if `residual`, a sum
    with it."""
    rows, width = y.shape
    expect(out.shape == (rows, _outputs(width, activation)), f"out cannot be {tuple(out.shape)}")
    expect_contiguous(y=y, out=out, bias=bias, weight_scale=weight_scale)
    _finish[(rows,)](
        y, _or(weight_scale, y), _or(bias, y), out, *_turning(turns, y), N=width,
        HEAD_DIM=2 if turns is None else turns.head_dim, BLOCK_N=min(1024, triton.next_power_of_2(width)),
        SCALED=weight_scale is not None, BIAS=bias is not None, ACTIVATION=activation, RESIDUAL=residual,
        TURNED=0 if turns is None else turns.columns, num_warps=4, **overlap(configs or {}),
    )  # fmt: skip
    return out


def _outputs(n: int, activation: Activation | None) -> int:
    # so many numbers an activation leaves of n
    expect(n % 2 == 0 or activation != "gated_silu", f"{n} outputs are no pairs of gates and ups")
    return n // 2 if activation == "gated_silu" else n


def _or(x: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    # a kernel that does not read an operand still needs a pointer
    return unused if x is None else x


def _turning(turns: Turns | None, unused: torch.Tensor) -> tuple[Any, ...]:
    # arguments of a kernel that may turn
    if turns is None:
        return unused, unused, 0, 1, 1
    return turns.table, turns.first, len(turns.table), turns.window, len(turns.first)


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
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    turns: Turns | None = None,
    activation: Activation | None = None,
    residual: bool = False,
    kv_cache: tuple[torch.Tensor, torch.Tensor] | None = None,
    slots: torch.Tensor | None = None,
    window: int = 1,
    scratch: torch.Tensor | None = None,
    normed: tuple[torch.Tensor, torch.Tensor] | None = None,
    exact: bool = False,
    config: dict[str, Any] | None = None,
) -> torch.Tensor:
    """x [rows, K] → out [rows, N], or [rows, N / 2] for "gated_silu", or with kv_cache the queries alone.

    weight: [N, K], float32, bfloat16 or float16, or int8 with weight_scale, float32 [N]: then products are made in the
    dtype of out if there is a gain, else of x. gain: [K], None = no norm. turns: of the queries and keys among the
    outputs. For either what belongs together stands side by side, see kernels/pairs.py. residual: out is float32 and is
    added to. kv_cache: (k, v), each [rows / window, n_kv_head, capacity, head_dim], for the fused projection of q, k
    and v; row r is written to slot slots[r // window] + r % window, unless that is −1 or past the capacity. That always
    takes the kernel, and an 8-bit cache cannot be written from here, for its scale needs a whole head: for either, use
    `append_kv`. exact: always the kernel, for what a row comes to there depends on no other. scratch: at least rows ·
    (K + N) of weight's dtype for the way over cuBLAS, so that a captured graph owns its memory; N · K more for an int8
    weight, and of the dtype in which products are made. normed: likewise for a norm that is made apart, [rows, K] of
    that dtype and float32 [rows].
    """
    rows, width = x.shape
    n = weight.shape[0]
    expect(weight.shape == (n, width), f"weight must be [N, {width}], not {tuple(weight.shape)}")
    scaled = weight_scale is not None
    expect(weight.dtype in ((torch.int8,) if scaled else PLAIN_TYPES), f"weight cannot be {weight.dtype}")
    expect(weight_scale is None or weight_scale.shape == (n,), f"weight_scale must be [{n}]")
    dtype = weight.dtype if not scaled else x.dtype if gain is None else out.dtype
    expect(gain is None or gain.shape == (width,), f"gain must be [{width}]")
    expect(bias is None or bias.shape == (n,), f"bias must be [{n}]")
    expect(not residual or out.dtype == torch.float32, "the residual stream is float32")
    expect(activation is None or (kv_cache is None and turns is None), "q, k and v have no activation")
    kv = 0 if kv_cache is None else kv_cache[0].shape[1] * kv_cache[0].shape[3]
    expect(out.shape == (rows, _outputs(n, activation) - 2 * kv), f"out cannot be {tuple(out.shape)}")
    expect_contiguous(x=x, weight=weight, out=out, gain=gain, bias=bias, slots=slots, weight_scale=weight_scale)
    if kv_cache is not None:
        expect(slots is not None and slots.dtype == torch.int32, "kv_cache needs slots, int32")
        expect(rows % window == 0, f"rows ({rows}) must be a multiple of window ({window})")
        expect(kv_cache[0].dtype in PLAIN_TYPES, "an 8-bit cache is written by append_kv")
        expect_contiguous(k_cache=kv_cache[0], v_cache=kv_cache[1])
    if turns is not None:
        turns.check(n)
        expect(kv_cache is None or kv_cache[0].shape[3] == turns.head_dim, "turns and cache must have one head_dim")
    head_dim = kv_cache[0].shape[3] if kv_cache else 2 if turns is None else turns.head_dim
    if config is None and not exact and kv_cache is None and uses_cublas(rows, configs):
        return _many_rows(
            x, weight, out, dtype, gain, weight_scale, bias, epsilon, turns, activation, residual, scratch, configs
        )

    k_cache, v_cache = kv_cache or (out, out)
    config = config or settings(configs, "norm_linear", rows, dtype, k=width, n=n)
    row_scale = None
    if gain is not None and config["apart"]:
        if normed is None:
            normed = (torch.empty_like(x, dtype=dtype), torch.empty(rows, dtype=torch.float32, device=x.device))
        norm_rows(x, gain, *normed, epsilon, configs=configs)
        (x, row_scale), gain = normed, None
    _norm_linear[(triton.cdiv(n, config["block_n"]), triton.cdiv(rows, config["block_m"]))](
        x, _or(gain, x), weight, _or(weight_scale, x), _or(row_scale, x), _or(bias, x), out, k_cache, v_cache,
        _or(slots, x), *_turning(turns, x), rows, window, k_cache.shape[2] if kv_cache else 0, epsilon,
        K=width, N=n, HEAD_DIM=head_dim, NORM=gain is not None, APART=row_scale is not None, SCALED=scaled,
        BIAS=bias is not None, ACTIVATION=activation, RESIDUAL=residual, KV=kv,
        TURNED=0 if turns is None else turns.columns, BLOCK_M=config["block_m"], BLOCK_N=config["block_n"],
        BLOCK_K=config["block_k"], STAGES=config["stages"], EARLY=config["early"], num_warps=config["warps"],
        **overlap(configs),
    )  # fmt: skip
    return out


def _many_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    dtype: torch.dtype,
    gain: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    turns: Turns | None,
    activation: Activation | None,
    residual: bool,
    scratch: torch.Tensor | None,
    configs: Table,
) -> torch.Tensor:
    rows, width = x.shape
    n = len(weight)
    needed = rows * (width + n)
    if scratch is None:
        converted = 0 if weight_scale is None else n * width
        scratch = torch.empty(needed + converted, dtype=dtype, device=x.device)
    if weight_scale is not None:  # bfloat16 holds every int8
        weight = scratch[needed : needed + n * width].view(n, width).copy_(weight)
    if gain is not None or x.dtype != dtype:
        x = rms_norm(x, gain, scratch[: rows * width].view(rows, width), epsilon, configs=configs)
    plain = weight_scale is None and bias is None and turns is None and activation is None and not residual
    if plain and out.dtype == dtype:
        return torch.mm(x, weight.T, out=out)
    y = torch.mm(x, weight.T, out=scratch[rows * width : needed].view(rows, n))
    ending: dict[str, Any] = {"turns": turns, "activation": activation, "residual": residual, "configs": configs}
    return finish(y, out, weight_scale=weight_scale, bias=bias, **ending)
