"""Norm, product, bias, activation and residual in plain PyTorch: the twin of kernels/norm_linear.py."""

from __future__ import annotations

import torch

from fastigpt.formulas import quick_gelu, rms_norm
from fastigpt.ops.kv_cache import append_kv_reference


def norm_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    gelu: bool = False,
    residual: bool = False,
    kv_cache: tuple[torch.Tensor, torch.Tensor] | None = None,
    slots: torch.Tensor | None = None,
    window: int = 1,
) -> torch.Tensor:
    """Arguments as the kernel has them; float32 inside."""
    h = x.float()
    if gain is not None:
        h = rms_norm(h, gain.float(), epsilon)
    h = h @ weight.float().T
    if bias is not None:
        h = h + bias.float()
    if gelu:
        h = quick_gelu(h)
    if kv_cache is not None:
        assert slots is not None
        _, n_head, _, head_dim = kv_cache[0].shape
        q, k, v = h.view(-1, window, 3, n_head, head_dim).unbind(2)
        append_kv_reference(k, v, *kv_cache, slots)
        h = q.reshape(out.shape)
    return out.copy_(out + h if residual else h)
