"""The RMS norm of rows as a kernel of its own, for layers of many rows, where every program would else repeat it.

It leaves h · gain, rounded as products take it, and a factor for each row, which products are multiplied by: bit for
bit what kernels/norm_linear.py makes of them itself, for sums of squares have the same order (kernels/products.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastigpt.kernels.launch import Table, expect, expect_contiguous
from fastigpt.kernels.overlap import begin, overlap
from fastigpt.kernels.products import (
    SLICES,
    add_squares,
    columns_of_slices,
    in_turn,
    load_gain,
    load_weights,
    sum_squares,
    whole_length,
)


@triton.jit
def _norm_rows(
    x,  # float32 [rows, K]
    gain,  # [K]
    out,  # [rows, K]
    factor,  # float32 [rows]
    rows,
    epsilon,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    has_row = row < rows
    begin(OVERLAP)
    squares = tl.zeros([SLICES, BLOCK_M, 8], tl.float32)
    for i in tl.range(0, whole_length(K), BLOCK_K, num_stages=1):
        k0 = in_turn(i, K)
        h = load_weights(x, row, has_row, k0, K, BLOCK_K)
        squares = add_squares(squares, h, out.dtype.element_ty)
        h *= load_gain(gain, k0, K, BLOCK_K)
        column, inside = columns_of_slices(k0, K, BLOCK_K)
        at = out + row.to(tl.int64)[None, :, None] * K + column
        tl.store(at, h.to(out.dtype.element_ty), mask=has_row[None, :, None] & inside)
    tl.store(factor + row, tl.rsqrt(sum_squares(squares) / K + epsilon), mask=has_row)


def norm_rows(
    x: torch.Tensor, gain: torch.Tensor, out: torch.Tensor, factor: torch.Tensor, epsilon: float, *, configs: Table
) -> None:
    """x: float32 [rows, K] → out [rows, K] of the dtype in which products are made, x · gain; factor, float32 [rows]:
    1 / √(mean x² + epsilon)."""
    rows, width = x.shape
    expect(x.dtype == factor.dtype == torch.float32, "x and factor must be float32")
    expect(out.shape == x.shape and gain.shape == (width,) and factor.shape == (rows,), "operands must fit each other")
    expect_contiguous(x=x, gain=gain, out=out, factor=factor)
    _norm_rows[(triton.cdiv(rows, 16),)](
        x, gain, out, factor, rows, epsilon, K=width, BLOCK_M=16, BLOCK_K=32, num_warps=8, **overlap(configs)
    )
