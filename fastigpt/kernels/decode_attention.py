"""Attention of a window of W ≥ 1 new queries per image, each image at its own position, against its cache.

The cache is read once for up to 32 queries; their scores are a matrix product, also where there is one query only, so
that a query's result depends neither on W nor on how many images there are. Every block of keys has a softmax state of
its own, and states are merged in the order of the keys. The blocks of an image can be split over several programs,
which leave their states in memory; the last one to finish merges them, so there is no second launch.

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
from fastigpt.kernels.online_softmax import attend_block, merge, part_scratch, score_scale
from fastigpt.kernels.overlap import begin, overlap
from fastigpt.kernels.prefix_attention import Prefix, prefix_attention
from fastigpt.kernels.products import prefetch

WIDEST = 32  # queries of a program: with more their products would become other instructions
_WIDEST_FLOAT32 = 16  # with more, registers are spilled where a cache is scaled


@triton.jit
def _load_part(part_m, part_l, part_acc, part, d, ok, HEAD_DIM: tl.constexpr):
    # The softmax states of BLOCK_W queries from memory; past the L1 cache, for another program has just written them.
    inside = ok[:, None] & (d < HEAD_DIM)[None, :]
    m = tl.load(part_m + part, mask=ok, other=float("-inf"), cache_modifier=".cg")
    l = tl.load(part_l + part[:, None], mask=ok[:, None], other=0.0, cache_modifier=".cg")
    acc = tl.load(part_acc + part[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    return m, l, acc


@triton.jit
def _merge_parts(
    m, l, acc, part_m, part_l, part_acc, part, distance, count, d, ok, HEAD_DIM: tl.constexpr, STAGES: tl.constexpr
):
    # `count` states from memory, `distance` apart, one after the other into a state.
    for i in tl.range(0, count, num_stages=STAGES):
        m_p, l_p, acc_p = _load_part(part_m, part_l, part_acc, part + i * distance, d, ok, HEAD_DIM)
        m, l, acc = merge(m, l, acc, m_p, tl.broadcast_to(l_p, l.shape), acc_p)
    return m, l, acc


@triton.jit
def _store(out, at, l, acc, mask):
    # l: [BLOCK_W, any], its columns equal
    total = tl.max(l, axis=1)
    tl.store(out + at, (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _prefetch(keys, first, length, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr):
    # Keys (or values) first … of a head's [capacity, HEAD_DIM], up to BLOCK_S or length, into the second level cache.
    BYTES: tl.constexpr = HEAD_DIM * keys.dtype.element_ty.primitive_bitwidth // 8
    LINES: tl.constexpr = triton.next_power_of_2((BLOCK_S * BYTES + 127) // 128)
    line = tl.arange(0, LINES) * (128 * 8 // keys.dtype.element_ty.primitive_bitwidth)
    prefetch(keys + first.to(tl.int64) * HEAD_DIM + line, line < (tl.minimum(length - first, BLOCK_S)) * HEAD_DIM)


@triton.jit
def _decode_attention(
    q,  # [lanes * W, n_head, head_dim], rows `q_stride` apart
    k,  # [lanes, n_kv_head, capacity, head_dim]
    v,
    k_scale,  # float32 [lanes, n_kv_head, capacity], used if SCALED
    v_scale,
    slots,  # int32 [lanes]: slot of the window's first key; -1 = the image is finished
    out,  # [lanes * W, n_head, head_dim]
    part_m,  # float32 [blocks of keys, lanes * W, n_head], used if SPLITS > 1
    part_l,
    part_acc,  # float32 [blocks of keys, lanes * W, n_head, head_dim]
    arrivals,  # int32 [blocks of queries, lanes * n_head], zero before and after
    prefix_m,  # the prefix's part_m, part_l, part_acc, used if PREFIX
    prefix_l,
    prefix_acc,
    source,  # int32 [lanes]: -1 = this lane reads no prefix
    lengths,  # int32 [sources], of the prefixes, used if PREFIX > 1
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
    PREFIX: tl.constexpr,  # keys of a state of the prefix; 0: there is none; 1: there is one state of all its keys
    SCALED: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    PARTS: tl.constexpr = HEADS // SHARE
    lane, split = tl.program_id(0) // PARTS, tl.program_id(1)
    head = tl.program_id(0) % PARTS * SHARE
    base = (lane.to(tl.int64) * (HEADS // GROUP) + head // GROUP) * capacity
    if OVERLAP:
        # Where the image is may change until the wait is over: this is a guess, and nothing but a prefetch follows it.
        guess = tl.minimum(tl.load(slots + lane, cache_modifier=".cg"), capacity)
        _prefetch(k + base * HEAD_DIM, split * BLOCK_S, guess, HEAD_DIM, BLOCK_S)
        _prefetch(v + base * HEAD_DIM, split * BLOCK_S, guess, HEAD_DIM, BLOCK_S)
    begin(OVERLAP)
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_window = w < WINDOW * SHARE
    if SHARE > 1:
        head += w // WINDOW
        w = w % WINDOW
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    in_head = d < HEAD_DIM
    row = lane.to(tl.int64) * WINDOW + w
    part = row * HEADS + head
    mask = in_window[:, None] & in_head[None, :]
    out_at = part[:, None] * HEAD_DIM + d[None, :]
    distance = tl.cast(rows_total, tl.int64) * HEADS

    first = tl.load(slots + lane, cache_modifier=".cg")
    queries = tl.load(q + (row * q_stride + head * HEAD_DIM)[:, None] + d[None, :], mask=mask, other=0.0)
    length = tl.where(first < 0, 0, tl.minimum(first + WINDOW, capacity))
    blocks = tl.cdiv(length, BLOCK_S)
    # Keys before the window every query may look at; then those that some may not. This program's are every SPLITS-th.
    before = tl.minimum(blocks, (first + 1) // BLOCK_S)
    own_start = split + tl.cdiv(tl.maximum(before - split, 0), SPLITS) * SPLITS
    m = tl.full([BLOCK_W], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_W, 8], tl.float32)
    acc = tl.zeros([BLOCK_W, BLOCK_D], tl.float32)
    prefixed = 0
    if PREFIX > 0:
        mine = tl.load(source + lane)
        prefixed = tl.where(mine >= 0, 1, 0)
        if PREFIX > 1:
            prefixed = tl.cdiv(tl.load(lengths + mine, mask=mine >= 0, other=0), PREFIX)
        if SPLITS == 1:
            m, l, acc = _merge_parts(
                m, l, acc, prefix_m, prefix_l, prefix_acc, part, distance, prefixed, d, in_window, HEAD_DIM, STAGES
            )
    for own in tl.static_range(2):
        from_block = split if own == 0 else own_start
        to_block = before if own == 0 else blocks
        for block in tl.range(from_block, to_block, SPLITS, num_stages=STAGES):
            key = block * BLOCK_S + s
            ok = key < length
            at = base + key
            inside = ok[:, None] & in_head[None, :]
            allowed = ok[None, :] & (key[None, :] <= (first + w)[:, None])
            at_d = at[:, None] * HEAD_DIM + d[None, :]
            m_b, l_b, acc_b = attend_block(
                queries, k + at_d, v + at_d, k_scale + at, v_scale + at, inside, allowed, ok, scale, SCALED, own == 1
            )
            if SPLITS == 1:
                m, l, acc = merge(m, l, acc, m_b, l_b, acc_b)
            else:
                place = part + block * distance
                tl.store(part_m + place, m_b, mask=in_window)
                tl.store(part_l + place, tl.max(l_b, axis=1), mask=in_window)
                tl.store(part_acc + place[:, None] * HEAD_DIM + d[None, :], acc_b, mask=mask)

    if SPLITS == 1:
        _store(out, out_at, l, acc, mask)
    else:
        tl.debug_barrier()  # every warp's stores before the one atomic that publishes them
        counter = arrivals + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            total = tl.zeros([BLOCK_W, 1], tl.float32)
            if PREFIX > 0:
                m, total, acc = _merge_parts(
                    m, total, acc, prefix_m, prefix_l, prefix_acc, part, distance, prefixed, d, in_window, HEAD_DIM,
                    STAGES,
                )  # fmt: skip
            m, total, acc = _merge_parts(
                m, total, acc, part_m, part_l, part_acc, part, distance, blocks, d, in_window, HEAD_DIM, STAGES
            )
            _store(out, out_at, total, acc, mask)
            tl.store(counter, 0)


def widest(dtype: torch.dtype) -> int:
    """The most queries of a program."""
    return _WIDEST_FLOAT32 if dtype == torch.float32 else WIDEST


def heads_of_a_program(group: int, window: int, dtype: torch.dtype) -> int:
    """How many of the `group` heads that look at the same keys a program takes: as many as divide them and keep to its
    most queries."""
    return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * window <= widest(dtype)))


def attention_scratch(
    lanes: int, window: int, n_head: int, n_kv_head: int, head_dim: int, capacity: int, dtype: torch.dtype,
    configs: Table, device: torch.device,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """What launches of these sizes need: part_m, part_l, part_acc, arrivals; None for each where one program has all
    keys."""
    config = _settings(configs, lanes, n_head // heads_of_a_program(n_head // n_kv_head, window, dtype), dtype)
    return _scratch(lanes, window, n_head, head_dim, capacity, dtype, config, device)


def keys_of_a_state(configs: Table, dtype: torch.dtype) -> int:
    """Keys that have a softmax state of their own, as many in every launch: part of what a result is."""
    return _settings(configs, 0, 1, dtype)["block_s"]


def _settings(configs: Table, lanes: int, programs: int, dtype: torch.dtype) -> dict[str, Any]:
    # programs: of a lane
    return settings(configs, "decode_attention", lanes * programs, dtype)


def warps_of(config: dict[str, Any], head_dim: int, scaled: bool, amd: bool) -> int:
    """Warps of a program. On NVIDIA a wide head that is made of 8 bits is spread over eight: four spill registers."""
    return max(8, config["warps"]) if scaled and padded_head(head_dim) > 64 and not amd else config["warps"]


def _scratch(
    lanes: int, window: int, n_head: int, head_dim: int, capacity: int, dtype: torch.dtype, config: dict[str, Any],
    device: torch.device,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    if config["splits"] == 1:
        return (None,) * 4
    parts = triton.cdiv(capacity, config["block_s"])
    arrivals = torch.zeros(triton.cdiv(window, widest(dtype)) * lanes * n_head, dtype=torch.int32, device=device)
    return (*part_scratch(parts, lanes * window, n_head, head_dim, device), arrivals)


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
    scratch: tuple[torch.Tensor | None, ...] | None = None,
    config: dict[str, Any] | None = None,
) -> torch.Tensor:
    """q: [lanes, W, n_head, head_dim] (rows may be apart, as in a fused qkv) → the same shape, contiguous.

    k_cache, v_cache: [lanes, n_kv_head, capacity, head_dim], float32, bfloat16 or float16, or int8 or float8_e4m3 with
    scales float32 [lanes, n_kv_head, capacity]; n_head / n_kv_head neighbouring heads look at one of keys. Query j of
    lane b looks at the prefix of b's source and at slots 0 … slots[b] + j, whose keys are in the cache already. scale:
    of scores; None: 1/√head_dim. slots: int32 [lanes]; −1: finished, the output means nothing. scratch: from
    `attention_scratch`, so that a captured graph owns its memory; else allocated here.
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
    share = heads_of_a_program(n_head // n_kv_head, window, q.dtype)
    config = config or _settings(configs, lanes, n_head // share, q.dtype)
    splits = config["splits"]
    block_w = min(widest(q.dtype), max(16, triton.next_power_of_2(window * share)))
    if out is None:
        out = torch.empty((lanes, window, n_head, head_dim), dtype=q.dtype, device=q.device)
    if scratch is None:
        scratch = _scratch(lanes, window, n_head, head_dim, capacity, q.dtype, config, q.device)
    if prefix is not None:
        prefix_attention(q, q_stride, prefix, configs, scale)
    parts: tuple[torch.Tensor | None, ...] = (None,) * 5
    state = 0
    if prefix is not None:
        parts = prefix.part_m, prefix.part_l, prefix.part_acc, prefix.source, prefix.lengths
        state = 1 if prefix.splits == 1 else prefix.block_s
    _decode_attention[(lanes * n_head // share, splits, triton.cdiv(window * share, block_w))](
        q, k_cache, v_cache, _or(k_scale, k_cache), _or(v_scale, v_cache), slots, out, *scratch, *parts,
        rows, q_stride, capacity, score_scale(head_dim, scale), HEADS=n_head, GROUP=n_head // n_kv_head, SHARE=share,
        HEAD_DIM=head_dim, BLOCK_D=padded_head(head_dim), WINDOW=window, BLOCK_W=block_w, BLOCK_S=config["block_s"],
        SPLITS=splits, PREFIX=state, SCALED=scaled, STAGES=config["stages"],
        num_warps=warps_of(config, head_dim, scaled, bool(torch.version.hip)), **overlap(configs),
    )  # fmt: skip
    return out


def _or(scale: torch.Tensor | None, cache: torch.Tensor) -> torch.Tensor:
    # A kernel that reads no scales still needs a pointer to do arithmetic on.
    return cache if scale is None else scale
