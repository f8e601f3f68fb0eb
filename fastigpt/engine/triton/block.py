"""The formula of a block, once: whole sequences and windows of tokens differ in how queries meet keys, and in nothing
else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastigpt.engine.triton.weights import Model
from fastigpt.kernels.norm_linear import norm_linear


class Attention(Protocol):
    """How the queries of block i meet keys and values."""

    def projection(self, i: int) -> dict[str, Any]:
        """Options of the launch that makes q, k and v: by how much rotary positions turn them, and where k and v go, if
        they go straight into a cache."""
        ...

    def attend(self, i: int, qkv: torch.Tensor, out: torch.Tensor) -> bool:
        """qkv: what that launch made. out: [rows, n_head · head_dim]. Returns whether anybody reads what the block
        makes of it."""
        ...


@dataclass(frozen=True)
class Work:
    """Memory of a block's launches for some number of rows. qkv: [rows, q + k + v], or [rows, q] where k and v go
    straight into a cache. attended: [rows, q]. inner: [rows, n_inner]. normed, exact: see `norm_linear`."""

    qkv: torch.Tensor
    attended: torch.Tensor
    inner: torch.Tensor
    normed: tuple[torch.Tensor, torch.Tensor]
    exact: bool

    @classmethod
    def empty(cls, model: Model, rows: int, *, straight: bool = False, exact: bool = False) -> Work:
        inner = model.spec.block.n_inner

        def memory(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=model.dtype, device=model.device)

        return cls(
            memory(rows, model.sections[0] if straight else sum(model.sections)),
            memory(rows, model.sections[0]),
            memory(rows, inner),
            (memory(rows, model.spec.width), torch.empty(rows, dtype=torch.float32, device=model.device)),
            exact,
        )


def run_block(model: Model, i: int, x: torch.Tensor, work: Work, attention: Attention) -> None:
    """x: float32 [rows, width], the residual stream, in place."""
    block = model.blocks[i]
    shared: dict[str, Any] = {"configs": model.configs, "epsilon": model.epsilon, "exact": work.exact}
    options = {**block.qkv.operands, **attention.projection(i), **shared}
    norm_linear(x, block.qkv.weight, work.qkv, gain=block.norm_1, normed=work.normed, **options)
    if not attention.attend(i, work.qkv, work.attended):
        return
    norm_linear(work.attended, block.proj.weight, x, residual=True, **block.proj.operands, **shared)
    options = {**block.fc.operands, "activation": model.spec.block.mlp, **shared}
    norm_linear(x, block.fc.weight, work.inner, gain=block.norm_2, normed=work.normed, **options)
    norm_linear(work.inner, block.out.weight, x, residual=True, **block.out.operands, **shared)
