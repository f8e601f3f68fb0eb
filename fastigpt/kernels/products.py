"""Products whose sums have one order, whatever blocks a kernel works in: what a row comes to depends on no other row.

The columns of a layer (K of them) are cut into eight slices. Within a slice the products are summed by `tl.dot` alone,
sixteen columns after sixteen: by the matrix instruction that warps of any number have, on NVIDIA m16n8k16, for eight
slices of a block are eight products side by side, which never become the wider instructions of a warp group. The sums
of the slices are then added as `add_slices` says. Rows, windows and launch configurations change which program computes
a number, and nothing about how. (One chain over all columns would have one order too, but wait for eight times as many
products in turn: at one row that is most of the time of a layer.)

tests/kernels/test_one_arithmetic.py reads all this out of what the compiler makes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastigpt.kernels.launch import interpreting

SLICES = tl.constexpr(8)
FIRST = tl.constexpr(64)  # columns of each slice that may be loaded early, and are used last
_WIDEN = tl.constexpr(interpreting())


@triton.constexpr_function
def slice_length(K):
    """Columns of a slice, of K columns in all: sixteens, so that the last slices may have fewer or none."""
    sixteens = 16 * SLICES.value
    return (K + sixteens - 1) // sixteens * 16


@triton.constexpr_function
def whole_length(K):
    """The same in whole FIRSTs: what a loop over a slice runs through."""
    return (slice_length(K) + FIRST.value - 1) // FIRST.value * FIRST.value


@triton.jit
def dot(a, b, acc):
    # acc + a @ b, summed in float32. The interpreter cannot multiply bfloat16; as float32 the products are the same.
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def add_slices(x):
    # [8, M, N] → [M, N]: ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))
    M: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[2]
    a, b = tl.split(tl.permute(tl.reshape(x, [2, 4, M, N]), (1, 2, 3, 0)))
    a, b = tl.split(tl.permute(tl.reshape(a + b, [2, 2, M, N]), (1, 2, 3, 0)))
    a, b = tl.split(tl.permute(a + b, (1, 2, 0)))
    return a + b


@triton.jit
def columns_of_slices(start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    # Columns start … of every slice, [8, 1, BLOCK_K], and which of them there are.
    LENGTH: tl.constexpr = slice_length(K)
    k = start + tl.arange(0, BLOCK_K)[None, None, :]
    column = tl.arange(0, SLICES)[:, None, None] * LENGTH + k
    return column, (k < LENGTH) & (column < K)


@triton.jit
def load_weights(weight, row, there, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    # weight [N, K], some rows of it → [8, rows, BLOCK_K]
    k, inside = columns_of_slices(start, K, BLOCK_K)
    at = weight + row.to(tl.int64)[None, :, None] * K + k
    return tl.load(at, mask=there[None, :, None] & inside, other=0.0)


@triton.jit
def prefetch(at, inside):
    # Asks for the lines at these addresses in the second level cache. Reads nothing: what is written there until
    # somebody does read is seen then.
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r", [at, inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def prefetch_weights(weight, row, there, start, K: tl.constexpr, COLUMNS: tl.constexpr):
    # Columns start … start + COLUMNS of every slice into the second level cache, one request a line of 128 bytes.
    LINE: tl.constexpr = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = triton.next_power_of_2((COLUMNS + LINE - 1) // LINE)
    LENGTH: tl.constexpr = slice_length(K)
    k = start + tl.arange(0, LINES)[None, None, :] * LINE
    column = tl.arange(0, SLICES)[:, None, None] * LENGTH + k
    inside = there[None, :, None] & (k < LENGTH) & (column < K)
    at = weight + row.to(tl.int64)[None, :, None] * K + column
    prefetch(at, inside)


@triton.jit
def load_gain(gain, start, K: tl.constexpr, BLOCK_K: tl.constexpr):
    # float32 [8, 1, BLOCK_K]
    k, inside = columns_of_slices(start, K, BLOCK_K)
    return tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def add_squares(squares, h, DTYPE: tl.constexpr):
    # squares [8, M, 8] += Σ h² in every column. Products too, so that their sum has the same order: of what they are in
    # bfloat16, and of the rest.
    square = h * h
    if DTYPE == tl.float32:
        squares = dot(square, tl.full([SLICES, h.shape[2], 8], 1.0, tl.float32), squares)
    else:
        ones = tl.full([SLICES, h.shape[2], 8], 1.0, tl.float32).to(tl.bfloat16)
        high = square.to(tl.bfloat16)
        squares = dot(high, ones, squares)
        squares = dot((square - high.to(tl.float32)).to(tl.bfloat16), ones, squares)
    return squares


@triton.jit
def sum_squares(squares):
    return tl.max(add_slices(squares), axis=1)  # they are all equal


@triton.jit
def add_products(acc, squares, h, gain, w, NORM: tl.constexpr):
    # acc [8, M, N] += h · gain @ wᵀ, and the squares of h. h: [8, M, BLOCK_K], w: [8, N, BLOCK_K]
    if NORM:
        h = h.to(tl.float32)
        squares = add_squares(squares, h, w.dtype)
        h *= gain
    return dot(h.to(w.dtype), tl.permute(w, (0, 2, 1)), acc), squares


@triton.jit
def in_turn(i, K: tl.constexpr):
    # Where in a slice columns are that are added i-th: the first FIRST come last.
    ALL: tl.constexpr = whole_length(K)
    return tl.where(i < ALL - FIRST, i + FIRST, i + FIRST - ALL)


@triton.jit
def sum_products(
    x, gain, weight, row, has_row, column, has_column, w_first, g_first,
    K: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    # Rows of x [rows, K] times rows of weight [N, K] → float32 [M, N], and the sums of their squares [M], if NORM.
    # The last columns to be added are the first FIRST of every slice: if EARLY, w_first and g_first, loaded before.
    # DTYPE: in which products are made, weight's if that is a float's.
    M: tl.constexpr = row.shape[0]
    N: tl.constexpr = column.shape[0]
    LENGTH: tl.constexpr = slice_length(K)
    acc = tl.zeros([SLICES, M, N], tl.float32)
    squares = tl.zeros([SLICES, M, 8], tl.float32)
    if EARLY:
        h_first = load_weights(x, row, has_row, 0, K, FIRST)
        for k0 in tl.range(FIRST, LENGTH, BLOCK_K, num_stages=STAGES):
            w = load_weights(weight, column, has_column, k0, K, BLOCK_K)
            h = load_weights(x, row, has_row, k0, K, BLOCK_K)
            g = load_gain(gain, k0, K, BLOCK_K) if NORM else 0.0
            acc, squares = add_products(acc, squares, h, g, w.to(DTYPE), NORM)
        acc, squares = add_products(acc, squares, h_first, g_first, w_first.to(DTYPE), NORM)
    else:
        for i in tl.range(0, whole_length(K), BLOCK_K, num_stages=STAGES):
            k0 = in_turn(i, K)
            w = load_weights(weight, column, has_column, k0, K, BLOCK_K)
            h = load_weights(x, row, has_row, k0, K, BLOCK_K)
            g = load_gain(gain, k0, K, BLOCK_K) if NORM else 0.0
            acc, squares = add_products(acc, squares, h, g, w.to(DTYPE), NORM)
    total = tl.zeros([M], tl.float32)
    if NORM:
        total = sum_squares(squares)
    return add_slices(acc), total
