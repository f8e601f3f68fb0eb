"""Top-k and top-p without a sort, over rows of scores.

Thresholds are found by bisection over the bit patterns of the scores, ties included: some seventy passes over a row.
One that is a single block is read once and stays in registers; the blocks of a larger one are read anew in every pass,
from the first level cache. `fastigpt.sampling.filter_logits` is the plain twin.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ordered(x):
    # float32 → int32 with the same order.
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def load_scores(rows, v0, V: tl.constexpr, BLOCK_V: tl.constexpr, CACHE: tl.constexpr):
    # rows: pointers [R] to scores. CACHE: ".cg" where other programs of this launch may have written them.
    v = v0 + tl.arange(0, BLOCK_V)[None, :]
    return tl.load(rows[:, None] + v, mask=v < V, other=float("-inf"), cache_modifier=CACHE)


@triton.jit
def _block(
    rows, first, v0, least, V: tl.constexpr, BLOCK_V: tl.constexpr, TOP_K: tl.constexpr, CACHE: tl.constexpr = ""
):
    # Scores of tokens v0 … of each row, −inf where their keys are below `least`.
    if V <= BLOCK_V:
        scores = first
    else:
        scores = load_scores(rows, v0, V, BLOCK_V, CACHE)
    if TOP_K:
        scores = tl.where(_ordered(scores) >= least[:, None], scores, float("-inf"))
    return scores


@triton.jit
def top_k_threshold(rows, first, k, V: tl.constexpr, BLOCK_V: tl.constexpr):
    # int32 [R]: the key of the k-th largest score; what is as good as it stays.
    low = tl.full([first.shape[0]], -0x80000000, tl.int64)  # at least k keys are >= low
    high = tl.full([first.shape[0]], 0x80000000, tl.int64)  # fewer are >= high
    for _ in range(32):
        middle = (low + high) >> 1
        count = tl.zeros([first.shape[0]], tl.int32)
        for v0 in range(0, V, BLOCK_V):
            keys = _ordered(_block(rows, first, v0, k, V, BLOCK_V, False))
            count += tl.sum((keys >= middle.to(tl.int32)[:, None]).to(tl.int32), axis=1)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count >= k, high, middle)
    return low.to(tl.int32)


@triton.jit
def top_p_threshold(rows, first, least, rest, V: tl.constexpr, BLOCK_V: tl.constexpr, TOP_K: tl.constexpr):
    # What `draw_filtered` needs to remove the least likely tokens while their probabilities sum to at most
    # rest = 1 − top_p: the key up to which they go, the sum below it, what each token of that key adds, and the last
    # of the likeliest tokens, which stays.
    R: tl.constexpr = first.shape[0]
    top = tl.full([R], float("-inf"), tl.float32)
    last = tl.zeros([R], tl.int32)
    for v0 in range(0, V, BLOCK_V):
        scores = _block(rows, first, v0, least, V, BLOCK_V, TOP_K)
        best = tl.max(scores, axis=1)
        v = v0 + tl.arange(0, BLOCK_V)
        here = tl.max(tl.where(scores == best[:, None], v[None, :], -1), axis=1)
        last = tl.where(best >= top, here, last)
        top = tl.maximum(top, best)
    total = tl.zeros([R], tl.float32)
    for v0 in range(0, V, BLOCK_V):
        scores = _block(rows, first, v0, least, V, BLOCK_V, TOP_K)
        total += tl.sum(tl.exp(scores - top[:, None]), axis=1)
    low = tl.full([R], -0x80000000, tl.int64)  # what is below low sums to at most rest
    high = tl.full([R], 0x80000000, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        below = _sum_below(rows, first, least, middle.to(tl.int32), top, total, V, BLOCK_V, TOP_K)
        fits = below.to(tl.float32) <= rest
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    threshold = low.to(tl.int32)
    below = _sum_below(rows, first, least, threshold, top, total, V, BLOCK_V, TOP_K)
    each = tl.zeros([R], tl.float64)
    for v0 in range(0, V, BLOCK_V):
        scores = _block(rows, first, v0, least, V, BLOCK_V, TOP_K)
        p = tl.max(tl.where(_ordered(scores) == threshold[:, None], _probability(scores, top, total), 0.0), axis=1)
        each = tl.maximum(each, p.to(tl.float64))
    return threshold, below, each, last


@triton.jit
def _probability(scores, top, total):
    return tl.exp(scores - top[:, None]) / total[:, None]


@triton.jit
def _sum_below(rows, first, least, threshold, top, total, V: tl.constexpr, BLOCK_V: tl.constexpr, TOP_K: tl.constexpr):
    below = tl.zeros([first.shape[0]], tl.float64)
    for v0 in range(0, V, BLOCK_V):
        scores = _block(rows, first, v0, least, V, BLOCK_V, TOP_K)
        p = tl.where(_ordered(scores) < threshold[:, None], _probability(scores, top, total), 0.0)
        below += tl.sum(p.to(tl.float64), axis=1)
    return below


@triton.jit
def draw_filtered(
    rows, noise, first, ok, k, rest, V: tl.constexpr, BLOCK_V: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    STORE: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    # int32 [R]: the argmax of score + noise over the tokens that top-k and then top-p leave; of equal ones the lowest.
    # noise: pointers [R], like rows. STORE: puts −inf in place of the scores that were removed, in rows that are ok.
    R: tl.constexpr = first.shape[0]
    least = k
    if TOP_K:
        least = top_k_threshold(rows, first, k, V, BLOCK_V)
    if TOP_P:
        threshold, below, each, last = top_p_threshold(rows, first, least, rest, V, BLOCK_V, TOP_K)
    most = tl.full([R], float("-inf"), tl.float32)
    token = tl.zeros([R], tl.int32)
    ties = tl.zeros([R], tl.int32)  # before this block
    for v0 in range(0, V, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        scores = _block(rows, first, v0, least, V, BLOCK_V, TOP_K, CACHE)
        if TOP_P:
            keys = _ordered(scores)
            tied = keys == threshold[:, None]
            rank = ties[:, None] + tl.cumsum(tied.to(tl.int32), axis=1)
            so_far = (below[:, None] + rank.to(tl.float64) * each[:, None]).to(tl.float32)
            removed = (keys < threshold[:, None]) | (tied & (so_far <= rest[:, None]))
            scores = tl.where(removed & (v[None, :] != last[:, None]), float("-inf"), scores)
            ties += tl.sum(tied.to(tl.int32), axis=1)
        if STORE:
            tl.store(rows[:, None] + v[None, :], scores, mask=ok[:, None] & (v < V)[None, :])
        value = scores + tl.load(noise[:, None] + v[None, :], mask=(v < V)[None, :], other=0.0, cache_modifier=".cg")
        best, at = tl.max(value, axis=1, return_indices=True)
        token = tl.where(best > most, v0 + at.to(tl.int32), token)
        most = tl.maximum(most, best)
    return token
