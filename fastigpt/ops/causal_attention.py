"""Causal attention of a whole sequence, or of its end: the operator of prefill and scoring."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastigpt import formulas
from fastigpt.kernels.launching import launching
from fastigpt.operands import operands, same_device
from fastigpt.ops import devices
from fastigpt.ops.checks import check_qkv_types, check_shape, need_tensors
from fastigpt.ops.register import register

Tensor = torch.Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, scaled by 1/√head_dim: query i of Tq looks at keys 0 … Tk − Tq + i.

    q: [B, Tq, n_head, head_dim], k, v: [B, Tk, n_head, head_dim], Tk ≥ Tq ≥ 1, all float32, bfloat16 or float16; tokens
    may be any distance apart, the heads of a token are contiguous. Returns [B, Tq, n_head, head_dim], contiguous.
    Raises ValueError or TypeError for anything else.
    """
    need_tensors(q=q, k=k, v=v)
    return torch.ops.fastigpt.causal_attention(q, k, v)


def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The plain twin, float32 inside."""
    queries, keys, values = (x.transpose(1, 2).float() for x in (q, k, v))  # [B, n_head, T, head_dim]
    y = formulas.causal_attention(queries, keys, values, before=k.shape[1] - q.shape[1])
    return y.transpose(1, 2).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, Tq, n_head, head_dim] with Tq of at least 1, not {list(q.shape)}")
    batch, tq, n_head, head_dim = q.shape
    if k.dim() != 4 or k.shape[1] < tq:
        raise ValueError(f"k must be [{batch}, at least {tq}, {n_head}, {head_dim}], not {list(k.shape)}")
    check_shape("k", k, (batch, k.shape[1], n_head, head_dim))
    check_shape("v", v, tuple(k.shape))
    check_qkv_types(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 or (x.shape[2] > 1 and x.stride(2) != x.shape[3]):
            raise ValueError(f"the heads of a token of {name} must be contiguous, not strides {list(x.stride())}")


def _run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = operands(q=q, k=k, v=v)
    _check(q, k, v)
    if not devices.by_triton(q):
        return _by_pytorch(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).contiguous()
    configs = devices.launch_configs(q)
    from fastigpt.kernels.causal_attention import causal_attention

    with launching(q.device):
        return causal_attention(q, k, v, configs=configs)


def _by_pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, n_head, Tq, head_dim], k, v [B, n_head, Tk, head_dim]. SDPA's own causal flag skips the masked half, but
    stands for this only where there are as many queries as keys."""
    tq, tk = q.shape[2], k.shape[2]
    if tq == 1 or tq == tk:
        return F.scaled_dot_product_attention(q, k, v, is_causal=tq > 1)
    seen = torch.ones(tq, tk, dtype=torch.bool, device=q.device).tril(tk - tq)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def _fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    same_device(q=q, k=k, v=v)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


register("causal_attention(Tensor q, Tensor k, Tensor v) -> Tensor", _run, _fake)
