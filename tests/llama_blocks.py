"""Tiny random models of Llama's blocks: rotary positions, gated MLPs, few key heads, a head with a hidden layer."""

from __future__ import annotations

import torch

from fastigpt.engine import Engine
from fastigpt.engine.choose import build
from fastigpt.spec import ROTARY, BlockSpec, ModelSpec

# Of the canvas, tokens and prefixes of conftest's PROMPTED, so that the same requests go to both.
LLAMA = ModelSpec(
    n_layer=2,
    width=16,
    block=BlockSpec(4, 2, 6, 20, 1e-5, "gated_silu"),
    height=4,
    columns=4,
    n_tokens=9,
    n_prefix_tokens=6,
    prefix_length=4,
    unconditional=(5,),
    positions="rotary",
    head_inner=24,
)


def angles(rows: int, head_dim: int, base: float = 100.0) -> torch.Tensor:
    """float64 [rows, head_dim / 2]: those of one dimension, as in Llama."""
    frequencies = base ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    return torch.arange(rows).double()[:, None] * frequencies


def turns(angles: torch.Tensor) -> torch.Tensor:
    return torch.stack([angles.cos(), angles.sin()], -1).float()


def llama_weights(spec: ModelSpec = LLAMA, seed: int = 0, *, biases: bool = True) -> dict[str, torch.Tensor]:
    """Weights whose logits spread over several nats, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in (spec.weight_shapes() | (spec.bias_shapes() if biases else {})).items():
        noise = torch.randn(shape, generator=generator)
        if name == ROTARY:
            found[name] = turns(angles(shape[0], spec.block.head_dim))
        elif "norm" in name:
            found[name] = 1 + 0.2 * noise
        elif name.endswith("bias"):
            found[name] = 0.3 * noise
        elif "embedding" in name:
            found[name] = 0.7 * noise
        else:
            found[name] = noise * shape[-1] ** -0.5 * (3 if name == "head.weight" else 1)
    return found


def llama(backend: str, spec: ModelSpec = LLAMA, seed: int = 31, **options: object) -> Engine:
    return build(spec, llama_weights(spec, seed), backend=backend, device="cpu", **options)  # type: ignore[arg-type]
