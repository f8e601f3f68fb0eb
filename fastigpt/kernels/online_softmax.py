"""The softmax over keys as it is met block by block, and how the states of two halves become one.

Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867. A state is (maximum, sum, weighted values), in base 2.
Every block of keys has one of its own, and these are merged in the order of the keys, whoever made them: what comes out
depends neither on how many programs share the keys nor on how many queries are beside a query.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastigpt.kernels.products import dot

LOG2_E = 1.4426950408889634


@triton.jit
def finite(m):
    # A softmax over nothing has the maximum -inf; 0 in its place keeps -inf - -inf from becoming NaN.
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def merge(m_a, l_a, acc_a, m_b, l_b, acc_b):
    # Two softmax states over different keys (maximum [W], sum [W, any], weighted values [W, D]) → the state over both.
    # A state over nothing changes no bit of the other, and which product is fused is said, so that the result depends
    # on the states alone.
    m = tl.maximum(m_a, m_b)
    a = tl.exp2(m_a - finite(m))[:, None]
    b = tl.exp2(m_b - finite(m))[:, None]
    return (
        m,
        tl.fma(l_a, tl.broadcast_to(a, l_a.shape), l_b * b),
        tl.fma(acc_a, tl.broadcast_to(a, acc_a.shape), acc_b * b),
    )


@triton.jit
def guard(v):
    # Values [S, D], and which of them are not finite, with zeros in their place: a query that may not look there gives
    # them the weight 0, and 0 times infinity is not 0. Whoever may look there is told by its scores.
    broken = tl.min((tl.abs(v.to(tl.float32)) < float("inf")).to(tl.int32), axis=1) == 0
    return tl.where(broken[:, None], 0.0, v).to(v.dtype), broken


@triton.jit
def attend_block(
    q,  # [BLOCK_W, BLOCK_D]
    keys,  # pointers [BLOCK_S, BLOCK_D]
    values,
    key_scales,  # pointers [BLOCK_S], used if SCALED
    value_scales,
    inside,  # [BLOCK_S, BLOCK_D]: what may be loaded
    allowed,  # [BLOCK_W, BLOCK_S]: which query may look at which key
    ok,  # [BLOCK_S]
    scale,
    SCALED: tl.constexpr,
    GUARDED: tl.constexpr,  # whether there may be keys that some queries may not look at
):
    # The softmax state of BLOCK_W queries over one block of keys: [BLOCK_W], [BLOCK_W, 8] (equal columns), [BLOCK_W,
    # BLOCK_D]. Weights are summed by a product, too: kernels/products.py says why.
    k = tl.load(keys, mask=inside, other=0.0).to(q.dtype)
    v = tl.load(values, mask=inside, other=0.0).to(q.dtype)
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32)) * scale
    if SCALED:
        scores *= tl.load(key_scales, mask=ok, other=0.0)[None, :]
    scores = tl.where(allowed, scores, float("-inf"))
    if SCALED:
        value_scale = tl.load(value_scales, mask=ok, other=0.0)
        if GUARDED:
            broken = ~(tl.abs(value_scale) < float("inf"))
            value_scale = tl.where(broken, 0.0, value_scale)
            scores = tl.where(allowed & broken[None, :], float("nan"), scores)
    if GUARDED:
        v, broken = guard(v)
        scores = tl.where(allowed & broken[None, :], float("nan"), scores)
    m = tl.max(scores, axis=1)
    p = tl.exp2(scores - finite(m)[:, None])
    ones = tl.full([k.shape[0], 8], 1.0, tl.float32).to(q.dtype)
    l = dot(p.to(q.dtype), ones, tl.zeros([q.shape[0], 8], tl.float32))
    if SCALED:
        p *= value_scale[None, :]
    acc = dot(p.to(q.dtype), v, tl.zeros([q.shape[0], v.shape[1]], tl.float32))
    return m, l, acc


def score_scale(head_dim: int, scale: float | None) -> float:
    """What scores are multiplied by before a softmax in base 2; scale None: 1/√head_dim."""
    return LOG2_E * (1 / math.sqrt(head_dim) if scale is None else scale)


def part_scratch(parts: int, rows: int, n_head: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """part_m, part_l, part_acc for `parts` softmax states per row and head."""
    shape = (parts, rows, n_head)
    m, l = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    return m, l, torch.empty((*shape, head_dim), dtype=torch.float32, device=device)
