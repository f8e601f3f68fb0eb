"""What follows the draws of a window: which of them stand, where the canvas is then, and the next window's inputs.

The ends of `sample_head` (kernels/sample_head.py says what its arguments are), run by one program for a block of
canvases.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(r, block, n, W: tl.constexpr, BLOCK_W: tl.constexpr, CANVASES: tl.constexpr):
    # Rows r of a block → (canvas int64, place in the window, whether there is such a row).
    j = r % BLOCK_W
    b = block * CANVASES + r // BLOCK_W
    ok = (r < CANVASES * BLOCK_W) & (j < W) & (b < n)
    return tl.where(ok, b, 0).to(tl.int64), j, ok


@triton.jit
def choose(b, place, ok, token, n_positions, canvas, position, chosen, BLOCK_W: tl.constexpr):
    # Notes the tokens of rows: what is known, else what was drawn.
    at = tl.load(position + b, mask=ok, other=0) + place
    known = tl.load(canvas + b * n_positions + at, mask=ok & (at < n_positions), other=-1)
    tl.store(chosen + b * (2 * BLOCK_W) + place, tl.where(known >= 0, known, token), mask=ok)


@triton.jit
def _nats_of_known(
    row, b, j, ok, n_positions, canvas, position, part_max, part_sum, known_logit, nats,
    TILES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # log p of each known token of the window, 0 where a token is drawn.
    top = tl.full([row.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([row.shape[0]], tl.float32)
    for t0 in range(0, TILES, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        place = row[:, None] * TILES + t[None, :]
        there = (t < TILES)[None, :]
        m = tl.load(part_max + place, mask=there, other=float("-inf"), cache_modifier=".cg")
        l = tl.load(part_sum + place, mask=there, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(m, axis=1))
        total = total * tl.exp(top - higher) + tl.sum(l * tl.exp(m - higher[:, None]), axis=1)
        top = higher
    at = tl.load(position + b, mask=ok, other=0) + j
    known = tl.load(canvas + b * n_positions + at, mask=ok & (at < n_positions), other=-1)
    logit = tl.load(known_logit + row, mask=known >= 0, other=0.0, cache_modifier=".cg")
    tl.store(nats + b * BLOCK_W + j, tl.where(known >= 0, logit - top - tl.log(total), 0.0), mask=ok)


@triton.jit
def _advance(
    block, n, n_positions, canvas, pass_starts, position, end, inputs, slots, offset, guided, scored, log_likelihood,
    failed, nats, chosen, broken,
    W: tl.constexpr, BLOCK_W: tl.constexpr, CANVASES: tl.constexpr, GUIDED: tl.constexpr, SCORE: tl.constexpr,
):  # fmt: skip
    # Keeps the draws up to and including the first that was guessed wrong, and moves the window behind them. None is
    # kept from logits that are not finite; those that a wrong guess led to do no harm.
    i = block * CANVASES + tl.arange(0, CANVASES)
    j = tl.arange(0, BLOCK_W)
    before = tl.load(position + i, mask=i < n, other=0)
    stop = tl.load(end + i, mask=i < n, other=0)
    live = before < stop
    mine = live[:, None] & (j < W)[None, :]
    drawn = tl.load(chosen + i[:, None] * (2 * BLOCK_W) + j[None, :], mask=mine, other=0, cache_modifier=".cg")
    guess = tl.load(inputs + i[:, None] * W + j[None, :] + 1, mask=mine & (j < W - 1)[None, :], other=-1)
    wrong = tl.where(drawn == guess, W - 1, tl.minimum(j, W - 1)[None, :] + tl.zeros_like(drawn))
    kept = tl.where(live, tl.minimum(tl.min(wrong, axis=1) + 1, stop - before), 0)
    spoilt = tl.load(broken + i[:, None] * BLOCK_W + j[None, :], mask=mine, other=0, cache_modifier=".cg") != 0
    tl.store(broken + i[:, None] * BLOCK_W + j[None, :], tl.zeros([CANVASES, BLOCK_W], tl.int32), mask=mine)
    first_spoilt = tl.min(tl.where(spoilt, j[None, :], BLOCK_W), axis=1)
    tl.store(failed + i, 1, mask=live & (first_spoilt < kept))
    kept = tl.minimum(kept, first_spoilt)
    after = before + kept
    more = after < stop
    place = i.to(tl.int64) * n_positions + before
    tl.store(canvas + place[:, None] + j[None, :], drawn, mask=mine & (j[None, :] < kept[:, None]))
    tl.store(pass_starts + place, tl.full([CANVASES], 1, tl.int8), mask=live)
    tl.store(position + i, after, mask=live)
    tl.store(slots + i, tl.where(more, after - tl.load(offset + i, mask=live, other=0), -1), mask=live)
    if GUIDED:
        negative = more & (tl.load(guided + i, mask=live, other=0) != 0)
        without = tl.load(offset + n + i, mask=live, other=0)
        tl.store(slots + n + i, tl.where(negative, after - without, -1), mask=live)
    if SCORE:
        passed = mine & (j[None, :] < kept[:, None]) & (tl.load(scored + i, mask=live, other=0) != 0)[:, None]
        found = tl.load(nats + i[:, None] * BLOCK_W + j[None, :], mask=passed, other=0.0)
        so_far = tl.load(log_likelihood + i, mask=live, other=0.0)
        tl.store(log_likelihood + i, so_far + tl.sum(found.to(tl.float64), axis=1), mask=live)
    again = mine & ((kept > 0) & (after < n_positions))[:, None]
    following = chosen + i[:, None] * (2 * BLOCK_W) + (kept - 1)[:, None] + j[None, :]
    tl.store(
        inputs + i[:, None] * W + j[None, :], tl.load(following, mask=again, other=0, cache_modifier=".cg"), mask=again
    )


@triton.jit
def _embed(
    block, n, n_positions, x, wte, wpe, position, inputs,
    WIDTH: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, CANVASES: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    # Token and, unless wpe is None, position of every input; those past the last position take its own, and nobody
    # reads what comes of them.
    b, j, ok = rows_of(tl.arange(0, BLOCK_R), block, n, W, BLOCK_W, CANVASES)
    start = tl.load(position + b, mask=ok, other=n_positions)
    ok = ok & (start < n_positions)
    at = tl.minimum(start + j, n_positions - 1).to(tl.int64)
    token = tl.load(inputs + b * W + j, mask=ok, other=0).to(tl.int64)
    row = b * W + j
    for e0 in range(0, WIDTH, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        mask = ok[:, None] & (e < WIDTH)[None, :]
        what = tl.load(wte + token[:, None] * WIDTH + e[None, :], mask=mask, other=0.0).to(tl.float32)
        if wpe is not None:
            what += tl.load(wpe + at[:, None] * WIDTH + e[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(x + row[:, None] * WIDTH + e[None, :], what, mask=mask)
        if GUIDED:
            tl.store(x + (row + n * W)[:, None] * WIDTH + e[None, :], what, mask=mask)


@triton.jit
def finish(
    block, n, n_positions, x, wte, wpe, canvas, pass_starts, position, end, inputs, slots, offset, guided, scored,
    log_likelihood, failed, part_max, part_sum, known_logit, nats, chosen, broken,
    WIDTH: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, CANVASES: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, TILES: tl.constexpr, BLOCK_T: tl.constexpr, GUIDED: tl.constexpr, SCORE: tl.constexpr,
    ADVANCE: tl.constexpr,
):  # fmt: skip
    # From the tokens of a window, which other threads may have just noted, to the next window.
    if SCORE:
        b, j, ok = rows_of(tl.arange(0, BLOCK_R), block, n, W, BLOCK_W, CANVASES)
        row = (block * BLOCK_R).to(tl.int64) + tl.arange(0, BLOCK_R)
        _nats_of_known(
            row, b, j, ok, n_positions, canvas, position, part_max, part_sum, known_logit, nats,
            TILES, BLOCK_T, BLOCK_W,
        )  # fmt: skip
    if ADVANCE:
        tl.debug_barrier()
        _advance(
            block, n, n_positions, canvas, pass_starts, position, end, inputs, slots, offset, guided, scored,
            log_likelihood, failed, nats, chosen, broken, W, BLOCK_W, CANVASES, GUIDED, SCORE,
        )  # fmt: skip
        tl.debug_barrier()
        _embed(
            block, n, n_positions, x, wte, wpe, position, inputs,
            WIDTH, W, BLOCK_W, CANVASES, BLOCK_R, BLOCK_E, GUIDED,
        )  # fmt: skip
