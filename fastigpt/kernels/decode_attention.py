"""Attention of a window of W ≥ 1 new queries per image, each image at its own position, against its cache.

The cache is read once for all W queries. With W = 1 the work is a stream: every key slot of a block keeps a softmax
of its own, so the loop holds no reduction across warps, and the slots are merged once at the end. With W > 1 the
scores are a matrix product. The keys of an image can be split over several programs; the last one to finish merges
the parts, so there is no second launch, and with one split nothing is merged at all.

Images of one source may share a prefix. It is read once per head for all of them, as a matrix product over all their
queries (`_prefix_attention`), and the result is merged into each image's own by log-sum-exp.

`decode_attention_reference` is the plain twin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
from fastigpt.kernels.overlap import begin, overlap

LOG2_E = 1.4426950408889634


@triton.jit
def _finite(m):
    # A softmax over nothing has the maximum -inf; 0 in its place keeps -inf - -inf from becoming NaN.
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _merge(m_a, l_a, acc_a, m_b, l_b, acc_b):
    # Two softmax states over different keys (maximum, sum, weighted values) → the state over both.
    m = tl.maximum(m_a, m_b)
    a = tl.exp2(m_a - _finite(m))
    b = tl.exp2(m_b - _finite(m))
    return m, l_a * a + l_b * b, acc_a * a[:, None] + acc_b * b[:, None]


@triton.jit
def _attend_block(
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
):
    # One block of keys and values into the running softmax of BLOCK_W queries.
    k = tl.load(keys, mask=inside, other=0.0).to(q.dtype)
    v = tl.load(values, mask=inside, other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SCALED:
        scores *= tl.load(key_scales, mask=ok, other=0.0)[None, :]
    scores = tl.where(allowed, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, axis=1))
    p = tl.exp2(scores - _finite(m_new)[:, None])
    alpha = tl.exp2(m - _finite(m_new))
    l = l * alpha + tl.sum(p, axis=1)
    if SCALED:
        p *= tl.load(value_scales, mask=ok, other=0.0)[None, :]
    acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l, acc


@triton.jit
def _prefix_attention(
    q,  # [lanes * W, n_head, head_dim], rows `q_stride` apart
    k,  # [sources, n_head, capacity, head_dim]
    v,
    k_scale,  # float32 [sources, n_head, capacity], used if SCALED
    v_scale,
    blocks,  # int32 [n_blocks, 3]: source, first row, number of rows (0: nothing to do)
    lengths,  # int32 [sources]
    part_m,  # float32 [SPLITS, lanes * W, n_head]
    part_l,
    part_acc,  # float32 [SPLITS, lanes * W, n_head, head_dim]
    rows_total,
    q_stride,
    capacity,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    source = tl.load(blocks + block * 3)
    first = tl.load(blocks + block * 3 + 1)
    count = tl.load(blocks + block * 3 + 2)
    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    row = (first + r).to(tl.int64)
    stored = r < count
    in_head = d < HEAD_DIM
    q_at = row[:, None] * q_stride + head * HEAD_DIM + d[None, :]
    queries = tl.load(q + q_at, mask=stored[:, None] & in_head[None, :], other=0.0)

    length = tl.where(count > 0, tl.load(lengths + source), 0)
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
    start = split * per_split
    end = tl.minimum(start + per_split, length)
    base = (source.to(tl.int64) * HEADS + head) * capacity
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for s0 in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        ok = s0 + s < end
        at = base + s0 + s
        inside = ok[:, None] & in_head[None, :]
        allowed = ok[None, :] & stored[:, None]
        at_d = at[:, None] * HEAD_DIM + d[None, :]
        m, l, acc = _attend_block(
            queries, k + at_d, v + at_d, k_scale + at, v_scale + at, inside, allowed, ok, m, l, acc, scale, SCALED
        )
    part = (split.to(tl.int64) * rows_total + row) * HEADS + head
    tl.store(part_m + part, m, mask=stored)
    tl.store(part_l + part, l, mask=stored)
    tl.store(part_acc + part[:, None] * HEAD_DIM + d[None, :], acc, mask=stored[:, None] & in_head[None, :])


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
    k,  # [lanes, n_head, capacity, head_dim]
    v,
    k_scale,  # float32 [lanes, n_head, capacity], used if SCALED
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
    rows_total,
    q_stride,
    capacity,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
    PREFIX_SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    lane, split = tl.program_id(0) // HEADS, tl.program_id(1)
    head = tl.program_id(0) % HEADS
    w = tl.arange(0, BLOCK_W)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    in_head = d < HEAD_DIM
    in_window = w < WINDOW
    row = lane.to(tl.int64) * WINDOW + w

    first = tl.load(slots + lane)
    length = tl.where(first < 0, 0, tl.minimum(first + WINDOW, capacity))
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
    start = split * per_split
    end = tl.minimum(start + per_split, length)
    base = (lane.to(tl.int64) * HEADS + head) * capacity

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
            p = tl.exp2(scores - _finite(m_new))
            alpha = tl.exp2(m_s - _finite(m_new))
            l_s = l_s * alpha + p
            if SCALED:
                p *= tl.load(v_scale + at, mask=ok, other=0.0)
            acc_s = acc_s * alpha[:, None] + p[:, None] * values
            m_s = m_new
        top = tl.max(m_s, axis=0)
        weight = tl.exp2(m_s - _finite(top))
        m = top + tl.zeros([1], tl.float32)
        l = tl.sum(l_s * weight, axis=0) + tl.zeros([1], tl.float32)
        acc = tl.sum(acc_s * weight[:, None], axis=0)[None, :]
    else:
        q_at = row[:, None] * q_stride + head * HEAD_DIM + d[None, :]
        queries = tl.load(q + q_at, mask=in_window[:, None] & in_head[None, :], other=0.0)
        m = tl.full([BLOCK_W], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_W], tl.float32)
        acc = tl.zeros([BLOCK_W, BLOCK_D], tl.float32)
        for s0 in tl.range(start, end, BLOCK_S, num_stages=STAGES):
            ok = s0 + s < end
            at = base + s0 + s
            inside = ok[:, None] & in_head[None, :]
            allowed = ok[None, :] & ((s0 + s)[None, :] <= (first + w)[:, None])
            at_d = at[:, None] * HEAD_DIM + d[None, :]
            m, l, acc = _attend_block(
                queries, k + at_d, v + at_d, k_scale + at, v_scale + at, inside, allowed, ok, m, l, acc, scale, SCALED
            )

    part = row * HEADS + head
    if PREFIX_SPLITS > 0:
        if split == 0:
            for i in range(PREFIX_SPLITS):
                at = part + i * rows_total * HEADS
                m_p, l_p, acc_p = _load_part(prefix_m, prefix_l, prefix_acc, at, d, in_window, HEAD_DIM)
                m, l, acc = _merge(m, l, acc, m_p, l_p, acc_p)
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
                m, l, acc = _merge(m, l, acc, m_p, l_p, acc_p)
            tl.store(out + out_at, (acc / tl.where(l > 0, l, 1.0)[:, None]).to(out.dtype.element_ty), mask=mask)
            tl.store(arrivals + tl.program_id(0), 0)


@dataclass(frozen=True)
class Prefix:
    """Keys and values that all images of a source share: k, v [sources, n_head, P, head_dim] (scales [sources,
    n_head, P]).

    lengths: int32 [sources], how much of P is used. blocks: int32 [n_blocks, 3], from `plan_prefix`. splits: programs
    that share the keys of a source and head. part_m, part_l, part_acc: scratch, from `prefix_scratch`.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    lengths: torch.Tensor
    blocks: torch.Tensor
    block_m: int
    splits: int
    part_m: torch.Tensor
    part_l: torch.Tensor
    part_acc: torch.Tensor


def plan_prefix(source: list[int], window: int, block_m: int) -> list[tuple[int, int, int]]:
    """(source, first row, rows) of every program of the prefix kernel. source: [lanes], equal numbers are
    neighbours.
    """
    blocks, lane = [], 0
    while lane < len(source):
        end = lane
        while end < len(source) and source[end] == source[lane]:
            end += 1
        for row in range(lane * window, end * window, block_m):
            blocks.append((source[lane], row, min(block_m, end * window - row)))
        lane = end
    return blocks


def part_scratch(splits: int, rows: int, n_head: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """part_m, part_l, part_acc for `splits` programs per row and head."""
    shape = (splits, rows, n_head)
    m, l = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    return m, l, torch.empty((*shape, head_dim), dtype=torch.float32, device=device)


def make_prefix(
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    source: list[int],
    window: int,
    configs: Table,
    dtype: torch.dtype,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> Prefix:
    """Plans the prefix of lanes whose sources are `source`, for windows of `window` queries of this dtype."""
    _, n_head, _, head_dim = k.shape
    expect_contiguous(prefix_k=k, prefix_v=v, prefix_k_scale=k_scale, prefix_v_scale=v_scale, lengths=lengths)
    config = settings(configs, "prefix_attention", len(source) * window, dtype)
    blocks = plan_prefix(source, window, config["block_m"])
    scratch = part_scratch(config["splits"], len(source) * window, n_head, head_dim, k.device)
    return Prefix(
        k, v, k_scale, v_scale, lengths, torch.tensor(blocks, dtype=torch.int32, device=k.device),
        config["block_m"], config["splits"], *scratch,
    )  # fmt: skip


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
    out: torch.Tensor | None = None,
    scratch: tuple[torch.Tensor, ...] | None = None,
    config: dict[str, Any] | None = None,
) -> torch.Tensor:
    """q: [lanes, W, n_head, head_dim] (rows may be apart, as in a fused qkv) → the same shape, contiguous.

    k_cache, v_cache: [lanes, n_head, capacity, head_dim], float32, bfloat16 or float16, or int8 or float8_e4m3 with
    scales float32 [lanes, n_head, capacity]; query j of lane b looks at the prefix of b's source and at slots 0 …
    slots[b] + j, whose keys are in the cache already. slots: int32 [lanes]; −1: finished, the output means nothing.
    scratch: (part_m, part_l, part_acc, arrivals), so that a captured graph owns its memory; else allocated here.
    """
    lanes, window, n_head, head_dim = q.shape
    capacity = k_cache.shape[2]
    q_stride = row_stride("q", q)
    shape = (lanes, n_head, capacity, head_dim)
    expect(k_cache.shape == v_cache.shape == shape, f"k_cache and v_cache must be {shape}, not {tuple(k_cache.shape)}")
    expect(k_cache.dtype == v_cache.dtype, "k_cache and v_cache must have one dtype")
    expect(k_cache.dtype in PLAIN_TYPES or k_cache.dtype in SCALED_TYPES, f"a cache cannot be {k_cache.dtype}")
    scaled = k_cache.dtype in SCALED_TYPES
    expect(scaled == (k_scale is not None) == (v_scale is not None), "scales go with an 8-bit cache, and only with one")
    expect(slots.dtype == torch.int32 and slots.shape == (lanes,), "slots must be int32 [lanes]")
    expect_contiguous(k_cache=k_cache, v_cache=v_cache, slots=slots, k_scale=k_scale, v_scale=v_scale, out=out)

    rows = lanes * window
    kernel = "decode_attention_1" if window == 1 else "decode_attention"
    config = config or settings(configs, kernel, lanes * n_head, q.dtype)
    splits = config["splits"]
    block_w = 1 if window == 1 and not config.get("dot", False) else max(16, triton.next_power_of_2(window))
    if out is None:
        out = torch.empty((lanes, window, n_head, head_dim), dtype=q.dtype, device=q.device)
    if splits == 1:
        part_m = part_l = part_acc = arrivals = None
    elif scratch is None:
        part_m, part_l, part_acc = part_scratch(splits, rows, n_head, head_dim, q.device)
        arrivals = torch.zeros(lanes * n_head, dtype=torch.int32, device=q.device)
    else:
        part_m, part_l, part_acc, arrivals = scratch
    scale = LOG2_E / math.sqrt(head_dim)
    block_d = padded_head(head_dim)
    if prefix is not None:
        prefix_config = settings(configs, "prefix_attention", rows, q.dtype)
        _prefix_attention[(len(prefix.blocks), n_head, prefix.splits)](
            q, prefix.k, prefix.v, _or(prefix.k_scale, prefix.k), _or(prefix.v_scale, prefix.v), prefix.blocks,
            prefix.lengths, prefix.part_m, prefix.part_l, prefix.part_acc, rows, q_stride, prefix.k.shape[2], scale,
            HEADS=n_head, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=prefix.block_m,
            BLOCK_S=prefix_config["block_s"], SPLITS=prefix.splits, SCALED=scaled,
            STAGES=prefix_config["stages"], num_warps=prefix_config["warps"], **overlap(configs),
        )  # fmt: skip
    parts = (None, None, None) if prefix is None else (prefix.part_m, prefix.part_l, prefix.part_acc)
    _decode_attention[(lanes * n_head, splits)](
        q, k_cache, v_cache, _or(k_scale, k_cache), _or(v_scale, v_cache), slots, out, part_m, part_l, part_acc,
        arrivals, *parts, rows, q_stride, capacity, scale,
        HEADS=n_head, HEAD_DIM=head_dim, BLOCK_D=block_d, WINDOW=window, BLOCK_W=block_w,
        BLOCK_S=config["block_s"], SPLITS=splits, PREFIX_SPLITS=0 if prefix is None else prefix.splits,
        SCALED=scaled, STAGES=config["stages"], num_warps=config["warps"], **overlap(configs),
    )  # fmt: skip
    return out


def _or(scale: torch.Tensor | None, cache: torch.Tensor) -> torch.Tensor:
    # A kernel that reads no scales still needs a pointer to do arithmetic on.
    return cache if scale is None else scale


def decode_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    prefix_k: torch.Tensor | None = None,
    prefix_v: torch.Tensor | None = None,
    prefix_k_scale: torch.Tensor | None = None,
    prefix_v_scale: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    source: list[int] | None = None,
) -> torch.Tensor:
    """The same in plain PyTorch, float32 inside."""

    def plain(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return x.float() if scale is None else x.float() * scale[..., None]

    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for lane, first in enumerate(slots.tolist()):
        if first < 0:
            continue
        for j in range(q.shape[1]):
            end = min(first + j + 1, k_cache.shape[2])
            k = plain(k_cache[lane, :, :end], None if k_scale is None else k_scale[lane, :, :end])
            v = plain(v_cache[lane, :, :end], None if v_scale is None else v_scale[lane, :, :end])
            if prefix_k is not None:
                assert prefix_v is not None and source is not None and lengths is not None
                at, length = source[lane], int(lengths[source[lane]])
                more_k = plain(
                    prefix_k[at, :, :length], None if prefix_k_scale is None else prefix_k_scale[at, :, :length]
                )
                more_v = plain(
                    prefix_v[at, :, :length], None if prefix_v_scale is None else prefix_v_scale[at, :, :length]
                )
                k, v = torch.cat([more_k, k], dim=1), torch.cat([more_v, v], dim=1)
            scores = torch.einsum("hd,hsd->hs", q[lane, j].float(), k) / math.sqrt(q.shape[-1])
            out[lane, j] = torch.einsum("hs,hsd->hd", scores.softmax(-1), v).to(q.dtype)
    return out
