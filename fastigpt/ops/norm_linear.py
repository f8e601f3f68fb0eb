"""Norm, product, bias, activation and residual in plain PyTorch: the twin of kernels/norm_linear.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastigpt.formulas import gated_silu, quick_gelu, rms_norm, rotate
from fastigpt.kernels.pairs import Activation, Turns, in_halves, side_by_side
from fastigpt.ops.kv_cache import append_kv_reference


def norm_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    gain: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    epsilon: float = 1e-5,
    turns: Turns | None = None,
    activation: Activation | None = None,
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
    if weight_scale is not None:
        h = h * weight_scale
    if bias is not None:
        h = h + bias.float()
    if turns is not None:
        h[:, : turns.columns] = turned(h[:, : turns.columns], turns)
    if activation is not None:
        h = ACTIVATIONS[activation](h)
    if kv_cache is not None:
        assert slots is not None
        _, n_kv_head, _, head_dim = kv_cache[0].shape
        h, k, v = h.split([out.shape[1], n_kv_head * head_dim, n_kv_head * head_dim], -1)
        shape = (-1, window, n_kv_head, head_dim)
        append_kv_reference(k.reshape(shape), v.reshape(shape), *kv_cache, slots)
    return out.copy_(out + h if residual else h)


ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gated_silu": lambda h: gated_silu(in_halves(h)),
}


def turned(h: torch.Tensor, turns: Turns) -> torch.Tensor:
    """h: [rows, columns], pairs side by side."""
    row = torch.arange(len(h), device=h.device)
    position = turns.first[row // turns.window % len(turns.first)] + row % turns.window
    angles = turns.table[position.clamp(max=len(turns.table) - 1).long(), None]  # [rows, 1, head_dim / 2, 2]
    heads = in_halves(h.unflatten(-1, (-1, turns.head_dim)))
    return side_by_side(rotate(heads, angles), -1).flatten(1)
