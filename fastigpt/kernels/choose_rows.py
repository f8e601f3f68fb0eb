"""Tokens of rows whose scores are filtered, as a launch of its own.

kernels/sample_head.py says what the arguments are. The rows of a block are shared out here, since some seventy passes
over each are made one after another; the last program of a block does the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastigpt.kernels.advance import choose, finish, rows_of
from fastigpt.kernels.filters import draw_filtered, load_scores
from fastigpt.kernels.overlap import begin


@triton.jit
def choose_filtered(
    r, block, rows_total, n, n_positions, canvas, position, top_k, top_p, scores, noise, chosen,
    TOKENS: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr,
    CANVASES: tl.constexpr, BLOCK_R: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, AHEAD: tl.constexpr,
    STORE: tl.constexpr,
):  # fmt: skip
    # Tokens of rows r of a block, from all their scores. AHEAD (0 or 1): for the positions W further on, from the
    # scores that the window's last row was left with (STORE), and noise of their own.
    b, j, ok = rows_of(r, block, n, W, BLOCK_W, CANVASES)
    scored = r
    if AHEAD == 1:
        scored = r - j + W - 1
    base = (block * BLOCK_R).to(tl.int64)
    rows = scores + (base + tl.where(ok, scored, 0)) * V
    noises = noise + (base + r + AHEAD * rows_total) * V
    k = tl.load(top_k + b)
    k = tl.where(k > 0, k, TOKENS).to(tl.int32)
    p = tl.load(top_p + b)
    rest = tl.where(p < 1.0, (1.0 - p).to(tl.float32), -1.0)
    CACHE: tl.constexpr = ".cg" if AHEAD == 1 else ""
    first = load_scores(rows, 0, V, BLOCK_V, CACHE)
    token = draw_filtered(rows, noises, first, ok, k, rest, V, BLOCK_V, TOP_K, TOP_P, STORE, CACHE)
    choose(b, j + AHEAD * W, ok, token, n_positions, canvas, position, chosen, BLOCK_W)


@triton.jit
def guess_filtered(
    block, rows_total, n, n_positions, canvas, position, top_k, top_p, scores, noise, chosen,
    TOKENS: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr,
    CANVASES: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # Guesses behind the window, from what filters left of its last row.
    tl.debug_barrier()
    for r0 in range(0, BLOCK_R, CHUNK):
        choose_filtered(
            r0 + tl.arange(0, CHUNK), block, rows_total, n, n_positions, canvas, position, top_k, top_p, scores, noise,
            chosen, TOKENS, V, BLOCK_V, W, BLOCK_W, CANVASES, BLOCK_R, False, False, 1, False,
        )  # fmt: skip


@triton.jit
def choose_rows(
    x, wte, wpe, canvas, pass_starts, position, end, inputs, slots, offset, top_k, top_p, guided, scored,
    log_likelihood, failed, scores, noise, part_max, part_sum, known_logit, nats, chosen, broken, arrivals, n,
    n_positions,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, W: tl.constexpr,
    BLOCK_W: tl.constexpr, CANVASES: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, GUIDED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    SCORE: tl.constexpr, ADVANCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # CHUNK rows of each block are filtered here, and the last program of a block does the rest. V: TOKENS, padded.
    # Other arguments as in `_sample_head`.
    begin(OVERLAP)
    block, chunk = tl.program_id(0), tl.program_id(1)
    rows_total = tl.num_programs(0).to(tl.int64) * BLOCK_R
    r = chunk * CHUNK + tl.arange(0, CHUNK)
    _, _, used = rows_of(r, block, n, W, BLOCK_W, CANVASES)
    if tl.max(used.to(tl.int32), axis=0) > 0:
        choose_filtered(
            r, block, rows_total, n, n_positions, canvas, position, top_k, top_p, scores, noise, chosen,
            TOKENS, V, BLOCK_V, W, BLOCK_W, CANVASES, BLOCK_R, TOP_K, TOP_P, 0, W > 1,
        )  # fmt: skip
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals + block, 1, sem="acq_rel")
    if arrived == tl.num_programs(1) - 1:
        tl.store(arrivals + block, 0)
        if W > 1:
            guess_filtered(
                block, rows_total, n, n_positions, canvas, position, top_k, top_p, scores, noise, chosen,
                TOKENS, V, BLOCK_V, W, BLOCK_W, CANVASES, BLOCK_R, CHUNK,
            )  # fmt: skip
        finish(
            block, n, n_positions, x, wte, wpe, canvas, pass_starts, position, end, inputs, slots, offset, guided,
            scored, log_likelihood, failed, part_max, part_sum, known_logit, nats, chosen, broken, WIDTH, W, BLOCK_W,
            CANVASES, BLOCK_R, BLOCK_E, TILES, BLOCK_T, GUIDED, SCORE, ADVANCE,
        )  # fmt: skip


def filter_warps(block_v: int) -> int:
    """Warps of a program that holds so many scores of a row."""
    return max(4, min(8, block_v // 512))
