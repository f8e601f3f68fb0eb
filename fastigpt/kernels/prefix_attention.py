"""Attention of the windows of many lanes to the prefixes they share, each read once for all lanes of its source.

Which lane reads which prefix is data on the device, so that canvases come and go without a launch being compiled or
captured anew. What comes out is what each lane's own softmax begins with in `decode_attention`, whose twin covers both:
one state for each block of keys if several programs share them, else one for all, merged in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from fastigpt.kernels.launch import SCALED_TYPES, Table, expect_contiguous, padded_head, settings
from fastigpt.kernels.online_softmax import attend_block, merge, part_scratch, score_scale
from fastigpt.kernels.overlap import begin, overlap


@triton.jit
def _prefix_attention(
    q,  # [lanes * W, n_head, head_dim], rows `q_stride` apart
    k,  # [sources, n_kv_head, capacity, head_dim]
    v,
    k_scale,  # float32 [sources, n_kv_head, capacity], used if SCALED
    v_scale,
    blocks,  # int32 [n_blocks, 3]: source, first row in `order`, number of rows (0: nothing to do)
    order,  # int32 [lanes]: lanes, those of one source side by side
    lengths,  # int32 [sources]
    part_m,  # float32 [blocks of keys, or 1 if SPLITS = 1, lanes * W, n_head]
    part_l,
    part_acc,  # float32 [the same, lanes * W, n_head, head_dim]
    rows_total,
    q_stride,
    capacity,
    window,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # heads of queries for one of keys
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
    stored = r < count
    lane = tl.load(order + (first + r) // window, mask=stored, other=0)
    row = lane.to(tl.int64) * window + (first + r) % window
    in_head = d < HEAD_DIM
    q_at = row[:, None] * q_stride + head * HEAD_DIM + d[None, :]
    queries = tl.load(q + q_at, mask=stored[:, None] & in_head[None, :], other=0.0)

    length = tl.where(count > 0, tl.load(lengths + source), 0)
    base = (source.to(tl.int64) * (HEADS // GROUP) + head // GROUP) * capacity
    part = row * HEADS + head
    distance = tl.cast(rows_total, tl.int64) * HEADS
    kept = stored[:, None] & in_head[None, :]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M, 8], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for s0 in tl.range(split * BLOCK_S, length, SPLITS * BLOCK_S, num_stages=STAGES):
        ok = s0 + s < length
        at = base + s0 + s
        inside = ok[:, None] & in_head[None, :]
        allowed = ok[None, :] & stored[:, None]
        at_d = at[:, None] * HEAD_DIM + d[None, :]
        m_b, l_b, acc_b = attend_block(
            queries, k + at_d, v + at_d, k_scale + at, v_scale + at, inside, allowed, ok, scale, SCALED, False
        )
        if SPLITS == 1:
            m, l, acc = merge(m, l, acc, m_b, l_b, acc_b)
        else:
            place = part + s0 // BLOCK_S * distance
            tl.store(part_m + place, m_b, mask=stored)
            tl.store(part_l + place, tl.max(l_b, axis=1), mask=stored)
            tl.store(part_acc + place[:, None] * HEAD_DIM + d[None, :], acc_b, mask=kept)
    if SPLITS == 1:
        # Read again, past the cache, so that no register holds it during the loop.
        lane = tl.load(order + (first + r) // window, mask=stored, other=0, cache_modifier=".cg")
        part = (lane.to(tl.int64) * window + (first + r) % window) * HEADS + head
        tl.store(part_m + part, m, mask=stored)
        tl.store(part_l + part, tl.max(l, axis=1), mask=stored)
        tl.store(part_acc + part[:, None] * HEAD_DIM + d[None, :], acc, mask=kept)


@dataclass(frozen=True)
class Prefix:
    """Keys and values that lanes of a source share: k, v [sources, n_kv_head, P, head_dim] (scales [sources, n_kv_head,
    P]).

    lengths: int32 [sources], how much of P is used. source: int32 [lanes], −1: this lane reads none. blocks: int32
    [n_blocks, 3] and order: int32 [lanes], from `plan_prefix`. splits: programs that share the keys of a source and
    head; block_s: keys of a softmax state. part_m, part_l, part_acc: scratch, from `part_scratch`.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    lengths: torch.Tensor
    source: torch.Tensor
    blocks: torch.Tensor
    order: torch.Tensor
    block_m: int
    block_s: int
    splits: int
    part_m: torch.Tensor
    part_l: torch.Tensor
    part_acc: torch.Tensor

    def of_layer(
        self, k: torch.Tensor, v: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None
    ) -> Prefix:
        """The same lanes and scratch, with another layer's keys and values."""
        return replace(self, k=k, v=v, k_scale=k_scale, v_scale=v_scale)

    def assign(self, source: Sequence[int], window: int) -> None:
        """Lane b reads the prefix of source[b] from now on, −1: none. Nothing that was launched or captured changes but
        by the data it finds."""
        blocks, order = plan_prefix(source, window, self.block_m)
        filled = torch.zeros(self.blocks.shape, dtype=torch.int32, device="cpu")
        filled[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32, device="cpu").view(-1, 3)
        self.blocks.copy_(filled)
        self.order[: len(order)].copy_(torch.tensor(order, dtype=torch.int32, device="cpu"))
        self.source.copy_(torch.tensor(source, dtype=torch.int32, device="cpu"))


def plan_prefix(source: Sequence[int], window: int, block_m: int) -> tuple[list[tuple[int, int, int]], list[int]]:
    """(source, first row, rows) of every program of the prefix kernel, and the lanes that read a prefix, those of one
    source side by side: row r is row r % window of lane order[r // window]. source: [lanes], −1: none."""
    order = sorted((lane for lane, at in enumerate(source) if at >= 0), key=lambda lane: source[lane])
    blocks, first = [], 0
    while first < len(order):
        end = first
        while end < len(order) and source[order[end]] == source[order[first]]:
            end += 1
        for row in range(first * window, end * window, block_m):
            blocks.append((source[order[first]], row, min(block_m, end * window - row)))
        first = end
    return blocks, order


def make_prefix(
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    source: Sequence[int],
    window: int,
    configs: Table,
    dtype: torch.dtype,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    n_head: int | None = None,
) -> Prefix:
    """The prefixes of lanes whose sources are `source` (−1: none), for windows of `window` queries of this dtype and
    n_head heads (None: as many as of keys). There is room for any other assignment of the same number of lanes and
    sources."""
    sources, n_kv_head, _, head_dim = k.shape
    n_head = n_kv_head if n_head is None else n_head
    expect_contiguous(prefix_k=k, prefix_v=v, prefix_k_scale=k_scale, prefix_v_scale=v_scale, lengths=lengths)
    lanes, rows, device = len(source), len(source) * window, k.device
    config = settings(configs, "prefix_attention", rows, dtype)
    # Every source may end in a block that is not full.
    n_blocks = min(sources, lanes) + rows // config["block_m"]
    parts = 1 if config["splits"] == 1 else triton.cdiv(k.shape[2], config["block_s"])
    prefix = Prefix(
        k, v, k_scale, v_scale, lengths, torch.empty(lanes, dtype=torch.int32, device=device),
        torch.empty((n_blocks, 3), dtype=torch.int32, device=device),
        torch.zeros(lanes, dtype=torch.int32, device=device), config["block_m"], config["block_s"],
        config["splits"], *part_scratch(parts, rows, n_head, head_dim, device),
    )  # fmt: skip
    prefix.assign(source, window)
    return prefix


def prefix_attention(q: torch.Tensor, q_stride: int, prefix: Prefix, configs: Table, scale: float | None) -> None:
    """q: [lanes, W, n_head, head_dim], rows `q_stride` apart → prefix.part_m, part_l, part_acc where a lane has one."""
    lanes, window, n_head, head_dim = q.shape
    rows, scaled = lanes * window, prefix.k.dtype in SCALED_TYPES
    config = settings(configs, "prefix_attention", rows, q.dtype)
    k_scale, v_scale = (prefix.k, prefix.v) if prefix.k_scale is None else (prefix.k_scale, prefix.v_scale)
    _prefix_attention[(len(prefix.blocks), n_head, prefix.splits)](
        q, prefix.k, prefix.v, k_scale, v_scale, prefix.blocks, prefix.order, prefix.lengths, prefix.part_m,
        prefix.part_l, prefix.part_acc, rows, q_stride, prefix.k.shape[2], window, score_scale(head_dim, scale),
        HEADS=n_head, GROUP=n_head // prefix.k.shape[1], HEAD_DIM=head_dim, BLOCK_D=padded_head(head_dim),
        BLOCK_M=prefix.block_m, BLOCK_S=prefix.block_s, SPLITS=prefix.splits, SCALED=scaled,
        STAGES=config["stages"], num_warps=config["warps"], **overlap(configs),
    )  # fmt: skip
