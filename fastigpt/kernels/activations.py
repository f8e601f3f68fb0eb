"""What follows a product inside a kernel: activations, and the turning of queries and keys by rotary positions.

Pairs of outputs stand side by side, see kernels/pairs.py. The plain twins are in fastigpt/formulas.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_pairs(x):
    # [M, N] → the first and the second of every pair of columns, [M, N / 2] each.
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    # [M, N] → the same shape, or [M, N / 2] for "gated_silu".
    if ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gated_silu":
        gate, up = split_pairs(x)
        x = gate * tl.sigmoid(gate) * up
    return x


@triton.jit
def turn(
    x,  # float32 [M, N]: columns first_column … of a product
    row,  # [M]
    has_row,
    first_column,
    turns,  # float32 [positions, HEAD_DIM / 2, 2]
    starts,  # int32 [lanes]: position of a lane's first row
    positions,
    window,  # rows of a lane
    lanes,
    COLUMNS: tl.constexpr,  # so many are turned
    HEAD_DIM: tl.constexpr,
):
    a, b = split_pairs(x)
    pair = first_column // 2 + tl.arange(0, x.shape[1] // 2)
    position = tl.load(starts + row // window % lanes, mask=has_row, other=0) + row % window
    position = tl.minimum(position, positions - 1)
    at = position[:, None] * HEAD_DIM + (pair % (HEAD_DIM // 2) * 2)[None, :]
    mask = has_row[:, None] & (pair < COLUMNS // 2)[None, :]
    cos = tl.load(turns + at, mask=mask, other=1.0)
    sin = tl.load(turns + at + 1, mask=mask, other=0.0)
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [x.shape[0], x.shape[1]])
