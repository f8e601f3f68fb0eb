"""Causal attention over a block of queries: prefill and scoring, with as many keys as queries or more.

Query i of Tq looks at keys 0 … Tk − Tq + i, so a block appended to a cache works as a whole sequence does. The
softmax runs online over blocks of keys (Dao et al. 2022, arXiv 2205.14135); blocks that no query masks are done
without a mask. On sm_90 the products become wgmma. The plain twin is in fastigpt/ops/causal_attention.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastigpt.kernels.launch import PLAIN_TYPES, Table, expect, expect_contiguous, expect_memory, padded_head, settings
from fastigpt.kernels.online_softmax import score_scale


@triton.jit
def _attend(
    q, k, v, m, l, acc, start, end, first, tk, stride_k, stride_v, i, d, scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Keys start … end into the online softmax of queries i, whose last visible key is first + i.
    for n0 in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        n = n0 + tl.arange(0, BLOCK_N)
        at_k = k + n.to(tl.int64)[:, None] * stride_k + d[None, :]
        at_v = v + n.to(tl.int64)[:, None] * stride_v + d[None, :]
        if MASKED:
            inside = (n < tk)[:, None] & (d < HEAD_DIM)[None, :]
            keys = tl.load(at_k, mask=inside, other=0.0)
            values = tl.load(at_v, mask=inside, other=0.0)
        elif PADDED:
            keys = tl.load(at_k, mask=(d < HEAD_DIM)[None, :], other=0.0)
            values = tl.load(at_v, mask=(d < HEAD_DIM)[None, :], other=0.0)
        else:
            keys = tl.load(at_k)
            values = tl.load(at_v)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(n[None, :] <= first + i[:, None], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        p = tl.exp2(scores - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    return m, l, acc


@triton.jit
def _causal_attention(
    q,  # [B, Tq, n_head, head_dim], heads contiguous
    k,  # [B, Tk, n_kv_head, head_dim]
    v,
    out,  # [B, Tq, n_head, head_dim], contiguous
    tq,
    tk,
    batch_q,  # strides between sequences and between tokens
    batch_k,
    batch_v,
    stride_q,
    stride_k,
    stride_v,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # heads of queries for one of keys
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The last queries have the most keys: they go first, so that no long program is left over at the end.
    # One axis for all of it: on the others CUDA allows 65,535 programs, and short sequences may be more.
    blocks = tl.cdiv(tq, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks // HEADS).to(tl.int64)
    head = tl.program_id(0) // blocks % HEADS
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    mask = (i < tq)[:, None] & (d < HEAD_DIM)[None, :]
    q_at = q + batch * batch_q + i.to(tl.int64)[:, None] * stride_q + head * HEAD_DIM + d[None, :]
    queries = tl.load(q_at, mask=mask, other=0.0)
    keys = k + batch * batch_k + head // GROUP * HEAD_DIM
    values = v + batch * batch_v + head // GROUP * HEAD_DIM
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = tk - tq  # query i sees keys up to first + i
    whole = (first + block * BLOCK_M + 1) // BLOCK_N * BLOCK_N  # keys that every query of the block sees
    end = tl.minimum(first + (block + 1) * BLOCK_M, tk)
    PADDED: tl.constexpr = BLOCK_D != HEAD_DIM
    m, l, acc = _attend(
        queries, keys, values, m, l, acc, 0, whole, first, tk, stride_k, stride_v, i, d, scale,
        HEAD_DIM, BLOCK_N, False, PADDED, STAGES,
    )  # fmt: skip
    m, l, acc = _attend(
        queries, keys, values, m, l, acc, whole, end, first, tk, stride_k, stride_v, i, d, scale,
        HEAD_DIM, BLOCK_N, True, PADDED, STAGES,
    )  # fmt: skip
    at = ((batch * tq + i)[:, None] * HEADS + head) * HEAD_DIM + d[None, :]
    tl.store(out + at, (acc / l[:, None]).to(out.dtype.element_ty), mask=mask)


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    configs: Table,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    config: dict[str, Any] | None = None,
) -> torch.Tensor:
    """q: [B, Tq, n_head, head_dim], k, v: [B, Tk, n_kv_head, head_dim], Tk ≥ Tq ≥ 1 → [B, Tq, n_head, head_dim],
    contiguous. n_head / n_kv_head neighbouring heads of queries look at one of keys.

    float32, bfloat16 or float16, all of one dtype. Tokens may be any distance apart (parts of a fused qkv), the heads
    of a token must be contiguous. Scores are multiplied by `scale`, None: 1/√head_dim.
    """
    batch, tq, n_head, head_dim = q.shape
    tk, n_kv_head = k.shape[1:3]
    fits = k.shape == v.shape == (batch, tk, n_kv_head, head_dim) and n_head % n_kv_head == 0
    expect(fits, f"k and v must be [{batch}, Tk, {n_head} or a divisor of it, {head_dim}]")
    expect(tk >= tq >= 1, f"there must be at least as many keys as queries, not {tk} and {tq}")
    expect(
        q.dtype == k.dtype == v.dtype and q.dtype in PLAIN_TYPES,
        f"q, k and v cannot be {q.dtype}, {k.dtype}, {v.dtype}",
    )
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect_memory(name, x)
        expect(
            x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == head_dim),
            f"the heads of a token of {name} must be contiguous",
        )
    if out is None:
        out = torch.empty((batch, tq, n_head, head_dim), dtype=q.dtype, device=q.device)
    expect(out.shape == q.shape, "out must be shaped as q")
    expect_contiguous(out=out)
    config = config or settings(configs, "causal_attention", head_dim, q.dtype)
    _causal_attention[(triton.cdiv(tq, config["block_m"]) * batch * n_head,)](
        q, k, v, out, tq, tk, q.stride(0), k.stride(0), v.stride(0), q.stride(1), k.stride(1), v.stride(1),
        score_scale(head_dim, scale), HEADS=n_head, GROUP=n_head // n_kv_head, HEAD_DIM=head_dim,
        BLOCK_D=padded_head(head_dim), BLOCK_M=config["block_m"], BLOCK_N=config["block_n"],
        STAGES=config["stages"], num_warps=config["warps"],
    )  # fmt: skip
    return out
