"""The softmax over keys as it is met block by block, and how the states of two halves become one.

Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867. A state is (maximum, sum, weighted values), in base 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def finite(m):
    # A softmax over nothing has the maximum -inf; 0 in its place keeps -inf - -inf from becoming NaN.
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def merge(m_a, l_a, acc_a, m_b, l_b, acc_b):
    # Two softmax states over different keys (maximum, sum, weighted values) → the state over both.
    m = tl.maximum(m_a, m_b)
    a = tl.exp2(m_a - finite(m))
    b = tl.exp2(m_b - finite(m))
    return m, l_a * a + l_b * b, acc_a * a[:, None] + acc_b * b[:, None]


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
    m,
    l,
    acc,
    scale,
    SCALED: tl.constexpr,
    GUARDED: tl.constexpr,  # whether there may be keys that some queries may not look at
):
    # One block of keys and values into the running softmax of BLOCK_W queries.
    k = tl.load(keys, mask=inside, other=0.0).to(q.dtype)
    v = tl.load(values, mask=inside, other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
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
    m_new = tl.maximum(m, tl.max(scores, axis=1))
    p = tl.exp2(scores - finite(m_new)[:, None])
    alpha = tl.exp2(m - finite(m_new))
    l = l * alpha + tl.sum(p, axis=1)
    if SCALED:
        p *= value_scale[None, :]
    acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l, acc


def score_scale(head_dim: int, scale: float | None) -> float:
    """What scores are multiplied by before a softmax in base 2; scale None: 1/√head_dim."""
    return LOG2_E * (1 / math.sqrt(head_dim) if scale is None else scale)


def part_scratch(splits: int, rows: int, n_head: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """part_m, part_l, part_acc for `splits` programs per row and head."""
    shape = (splits, rows, n_head)
    m, l = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    return m, l, torch.empty((*shape, head_dim), dtype=torch.float32, device=device)
