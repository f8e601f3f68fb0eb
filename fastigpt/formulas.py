"""Formulas in plain PyTorch that the reference engine, what trains a model and the kernels' plain twins are made of.

Each stands here once, in the dtype of its arguments: whoever wants another converts first.
"""

from __future__ import annotations

import math

import torch


def rms_norm(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x [..., width] over the root of its mean square, times gain [width]: a norm without mean or bias."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * gain


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def gated_silu(x: torch.Tensor) -> torch.Tensor:
    """[..., n] from [..., 2 n]: silu of the first half, the gates, times the second."""
    gate, up = x.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """x [..., head_dim], each pair (p, p + head_dim / 2) of its elements times a complex number. turns: [..., head_dim
    / 2, 2], their real and imaginary parts, broadcast against x's axes."""
    a, b = x.chunk(2, -1)
    cos, sin = turns.unbind(-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: int = 0) -> torch.Tensor:
    """[..., Tq, head_dim]: softmax(q kᵀ / √head_dim) v, where query i looks at keys 0 … before + i.

    q: [..., Tq, head_dim], k, v: [..., Tk, head_dim]. before: how many keys come before the first query's own.
    """
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(before + 1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v
