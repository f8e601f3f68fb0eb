"""Attention of a window of W ≥ 1 new queries per image, each image at its own position, against its cache.

The cache is read once for all W queries. With W = 1 the work is a stream: every key slot of a block keeps a softmax
of its own, so the loop holds no reduction across warps, and the slots are merged once at the end. With W > 1 the
scores are a matrix product. The keys of an image can be split over several programs; the last one to finish merges
the parts, so there is no second launch, and with one split nothing is merged at all.

Neighbouring heads of queries may share one of keys: a program then has the queries of as many of them as it has room
for, as if they were more of a window.

Images of one source may share a prefix. It is read once per head for all of them, as a matrix product over all their
queries (kernels/prefix_attention.py), and the result is merged into each image's own by log-sum-exp.

The plain twin is in fastigpt/ops/decode_attention.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastigpt.kernels.launch import (
    PLAIN_TYPES,
    SCALED_TYPES,
    Table,
    expect,
    expect_contiguous,
    padded_head,
    row_stride,
    settings,
)
from fastigpt.kernels.online_softmax import attend_block, finite, merge, part_scratch, score_scale
from fastigpt.kernels.overlap import begin, overlap
from fastigpt.kernels.prefix_attention import Prefix, prefix_attention


@triton.jit
def _load_part(part_m, part_l, part_acc, part, d, ok, HEAD_DIM: tl.constexpr):
    # The softmax states of BLOCK_W queries from memory; past the L1 cache, for another program has just written them.
    inside = ok[:, None] & (d < HEAD_DIM)[None, :]
    m = tl.load(part_m + part, mask=ok, other=float("-inf"), cache_modifier=".cg")
    l = tl.load(part_l + part, mask=ok, other=0.0, cache_modifier=".cg")
    acc = tl.load(part_acc + part[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    return m, l, acc


@triton.jit
def _decode_attention(
    q,  # [lanes * W, n_head, head_dim], rows `q_stride` apart
    k,  # [lanes, n_kv_head, capacity, head_dim]
    v,
    k_scale,  # float32 [lanes, n_kv_head, capacity], used if SCALED
    v_scale,
    slots,  # int32 [lanes]: slot of the window's first key; -1 = the image is finished
    out,  # [lanes * W, n_head, head_dim]
    part_m,  # float32 [SPLITS, lanes * W, n_head], used if SPLITS > 1
    part_l,
    part_acc,  # float32 [SPLITS, lanes * W, n_head, head_dim]
    arrivals,  # int32 [lanes * n_head], zero before and after
    prefix_m,  # the prefix's part_m, part_l, part_acc, used if PREFIX_SPLITS
    prefix_l,
    prefix_acc,
    source,  # int32 [lanes]: -1 = this lane reads no prefix
    rows_total,
    q_stride,
    capacity,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # heads of queries for one of keys
    SHARE: tl.constexpr,  # of them, those of a program
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,  # at least SHARE * WINDOW queries: the windows of SHARE heads, one after the other
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
    PREFIX_SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    PARTS: tl.constexpr = HEADS // SHARE
    lane, split = tl.program_id(0) // PARTS, tl.program_id(1)
    head = tl.program_id(0) % PARTS * SHARE
    kv_head = head // GROUP
    w = tl.arange(0, BLOCK_W)
    in_window = w < WINDOW * SHARE
    if SHARE > 1:
        head += w // WINDOW
        w = w % WINDOW
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    in_head = d < HEAD_DIM
    row = lane.to(tl.int64) * WINDOW + w

    first = tl.load(slots + lane)
    length = tl.where(first < 0, 0, tl.minimum(first + WINDOW, capacity))
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
    start = split * per_split
    end = tl.minimum(start + per_split, length)
    base = (lane.to(tl.int64) * (HEADS // GROUP) + kv_head) * capacity

    if BLOCK_W == 1:
        # [BLOCK_S] softmax states, one for each key slot of a block, merged after the loop.
        query = tl.load(q + lane.to(tl.int64) * q_stride + head * HEAD_DIM + d, mask=in_head, other=0.0)
        query = query.to(tl.float32) * scale
        m_s = tl.full([BLOCK_S], float("-inf"), tl.float32)
        l_s = tl.zeros([BLOCK_S], tl.float32)
        acc_s = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        for s0 in tl.range(start, end, BLOCK_S, num_stages=STAGES):
            ok = s0 + s < end
            at = base + s0 + s
            at_d = at[:, None] * HEAD_DIM + d[None, :]
            inside = ok[:, None] & in_head[None, :]
            keys = tl.load(k + at_d, mask=inside, other=0.0).to(tl.float32)
            values = tl.load(v + at_d, mask=inside, other=0.0).to(tl.float32)
            scores = tl.sum(keys * query[None, :], axis=1)
            if SCALED:
                scores *= tl.load(k_scale + at, mask=ok, other=0.0)
            scores = tl.where(ok, scores, float("-inf"))
            m_new = tl.maximum(m_s, scores)
            p = tl.exp2(scores - finite(m_new))
            alpha = tl.exp2(m_s - finite(m_new))
            l_s = l_s * alpha + p
            if SCALED:
                p *= tl.load(v_scale + at, mask=ok, other=0.0)
            acc_s = acc_s * alpha[:, None] + p[:, None] * values
            m_s = m_new
        top = tl.max(m_s, axis=0)
        weight = tl.exp2(m_s - finite(top))
        m = top + tl.zeros([1], tl.float32)
        l = tl.sum(l_s * weight, axis=0) + tl.zeros([1], tl.float32)
        acc = tl.sum(acc_s * weight[:, None], axis=0)[None, :]
    else:
        q_at = (row * q_stride + head * HEAD_DIM)[:, None] + d[None, :]
        queries = tl.load(q + q_at, mask=in_window[:, None] & in_head[None, :], other=0.0)
        m = tl.full([BLOCK_W], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_W], tl.float32)
        acc = tl.zeros([BLOCK_W, BLOCK_D], tl.float32)
        # Keys before the window every query may look at; then those that some may not.
        before = tl.maximum(start, tl.minimum(end, (first + 1) // BLOCK_S * BLOCK_S))
        for own in tl.static_range(2):
            from_key = start if own == 0 else before
            to_key = before if own == 0 else end
            for s0 in tl.range(from_key, to_key, BLOCK_S, num_stages=STAGES):
                ok = s0 + s < end
                at = base + s0 + s
                inside = ok[:, None] & in_head[None, :]
                allowed = ok[None, :] & ((s0 + s)[None, :] <= (first + w)[:, None])
                at_d = at[:, None] * HEAD_DIM + d[None, :]
                m, l, acc = attend_block(
                    queries, k + at_d, v + at_d, k_scale + at, v_scale + at, inside, allowed, ok, m, l, acc, scale,
                    SCALED, own == 1,
                )  # fmt: skip

    part = row * HEADS + head
    if PREFIX_SPLITS > 0:
        if (split == 0) & (tl.load(source + lane) >= 0):
            for i in range(PREFIX_SPLITS):
                at = part + i * rows_total * HEADS
                m_p, l_p, acc_p = _load_part(prefix_m, prefix_l, prefix_acc, at, d, in_window, HEAD_DIM)
                m, l, acc = merge(m, l, acc, m_p, l_p, acc_p)
    out_at = part[:, None] * HEAD_DIM + d[None, :]
    mask = in_window[:, None] & in_head[None, :]
    if SPLITS == 1:
        tl.store(out + out_at, (acc / tl.where(l > 0, l, 1.0)[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        at = part + split * rows_total * HEADS
        tl.store(part_m + at, m, mask=in_window)
        tl.store(part_l + at, l, mask=in_window)
        tl.store(part_acc + at[:, None] * HEAD_DIM + d[None, :], acc, mask=mask)
        tl.debug_barrier()  # every warp's stores before the one atomic that publishes them
        arrived = tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            m, l, acc = _load_part(part_m, part_l, part_acc, part, d, in_window, HEAD_DIM)
            for i in range(1, SPLITS):
                at = part + i * rows_total * HEADS
                m_p, l_p, acc_p = _load_part(part_m, part_l, part_acc, at, d, in_window, HEAD_DIM)
                m, l, acc = merge(m, l, acc, m_p, l_p, acc_p)
            tl.store(out + out_at, (acc / tl.where(l > 0, l, 1.0)[:, None]).to(out.dtype.element_ty), mask=mask)
            tl.store(arrivals + tl.program_id(0), 0)


def heads_of_a_program(group: int, window: int) -> int:
    """How many of the `group` heads that look at the same keys a program takes: as many as divide them and keep to 32
    queries."""
    return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * window <= 32))


def decode_settings(
    configs: Table, lanes: int, window: int, n_head: int, n_kv_head: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The launch configuration for queries [lanes, window, n_head]."""
    share = heads_of_a_program(n_head // n_kv_head, window)
    kernel = "decode_attention_1" if window * share == 1 else "decode_attention"
    return settings(configs, kernel, lanes * n_head // share, dtype)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    configs: Table,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    prefix: Prefix | None = None,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    scratch: tuple[torch.Tensor, ...] | None = None,
    config: dict[str, Any] | None = None,
) -> torch.Tensor:
    """q: [lanes, W, n_head, head_dim] (rows may be apart, as in a fused qkv) → the same shape, contiguous.

    k_cache, v_cache: [lanes, n_kv_head, capacity, head_dim], float32, bfloat16 or float16, or int8 or float8_e4m3 with
    scales float32 [lanes, n_kv_head, capacity]; n_head / n_kv_head neighbouring heads look at one of keys. Query j of
    lane b looks at the prefix of b's source and at slots 0 … slots[b] + j, whose keys are in the cache already. scale:
    of scores; None: 1/√head_dim. slots: int32 [lanes]; −1: finished, the output means nothing. scratch: (part_m,
    part_l, part_acc, arrivals), so that a captured graph owns its memory; else allocated here.
    """
    lanes, window, n_head, head_dim = q.shape
    n_kv_head, capacity = k_cache.shape[1:3]
    q_stride = row_stride("q", q)
    expect(n_head % n_kv_head == 0, f"{n_head} heads of queries cannot share {n_kv_head} of keys")
    shape = (lanes, n_kv_head, capacity, head_dim)
    expect(k_cache.shape == v_cache.shape == shape, f"k_cache and v_cache must be {shape}, not {tuple(k_cache.shape)}")
    expect(k_cache.dtype == v_cache.dtype, "k_cache and v_cache must have one dtype")
    expect(k_cache.dtype in PLAIN_TYPES or k_cache.dtype in SCALED_TYPES, f"a cache cannot be {k_cache.dtype}")
    scaled = k_cache.dtype in SCALED_TYPES
    expect(scaled == (k_scale is not None) == (v_scale is not None), "scales go with an 8-bit cache, and only with one")
    expect(slots.dtype == torch.int32 and slots.shape == (lanes,), "slots must be int32 [lanes]")
    expect_contiguous(k_cache=k_cache, v_cache=v_cache, slots=slots, k_scale=k_scale, v_scale=v_scale, out=out)

    rows = lanes * window
    share = heads_of_a_program(n_head // n_kv_head, window)
    config = config or decode_settings(configs, lanes, window, n_head, n_kv_head, q.dtype)
    splits, queries = config["splits"], window * share
    block_w = 1 if queries == 1 and not config.get("dot", False) else max(16, triton.next_power_of_2(queries))
    if out is None:
        out = torch.empty((lanes, window, n_head, head_dim), dtype=q.dtype, device=q.device)
    if splits == 1:
        part_m = part_l = part_acc = arrivals = None
    elif scratch is None:
        part_m, part_l, part_acc = part_scratch(splits, rows, n_head, head_dim, q.device)
        arrivals = torch.zeros(lanes * n_head, dtype=torch.int32, device=q.device)
    else:
        part_m, part_l, part_acc, arrivals = scratch
    block_d = padded_head(head_dim)
    if prefix is not None:
        prefix_attention(q, q_stride, prefix, configs, scale)
    parts: tuple[torch.Tensor | None, ...] = (None, None, None, None)
    if prefix is not None:
        parts = prefix.part_m, prefix.part_l, prefix.part_acc, prefix.source
    _decode_attention[(lanes * n_head // share, splits)](
        q, k_cache, v_cache, _or(k_scale, k_cache), _or(v_scale, v_cache), slots, out, part_m, part_l, part_acc,
        arrivals, *parts, rows, q_stride, capacity, score_scale(head_dim, scale),
        HEADS=n_head, GROUP=n_head // n_kv_head, SHARE=share, HEAD_DIM=head_dim, BLOCK_D=block_d, WINDOW=window,
        BLOCK_W=block_w, BLOCK_S=config["block_s"], SPLITS=splits, PREFIX_SPLITS=0 if prefix is None else prefix.splits,
        SCALED=scaled, STAGES=config["stages"], num_warps=config["warps"], **overlap(configs),
    )  # fmt: skip
    return out


def _or(scale: torch.Tensor | None, cache: torch.Tensor) -> torch.Tensor:
    # A kernel that reads no scales still needs a pointer to do arithmetic on.
    return cache if scale is None else scale
