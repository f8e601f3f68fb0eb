"""What the sampling head works on: the canvases of a session, each as far as it is and drawn in its own way.

All of it are rows of tensors on the device, so that canvases come and go without a launch being compiled or captured
anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastigpt.sampling import Drawing, Drawings


@dataclass(frozen=True)
class Head:
    """What the head needs of a model: gain [width], weight [tokens, width or inner]; for the inputs of a canvas wte
    [tokens, width] and, if positions are learned, wpe [n_positions, width], the row of the input that scores each
    position. inner_weight, inner_bias: [inner, width] and [inner] of its hidden layer, whose activation is the exact
    GELU, and bias: [tokens] behind it, if it has one.
    """

    gain: torch.Tensor
    weight: torch.Tensor
    wte: torch.Tensor
    wpe: torch.Tensor | None
    epsilon: float
    bias: torch.Tensor | None = None
    inner_weight: torch.Tensor | None = None
    inner_bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Steps:
    """What any of the canvases needs besides the draw itself: kernels are compiled for it."""

    guided: bool = False
    top_k: bool = False
    top_p: bool = False
    score: bool = False

    @classmethod
    def of(cls, drawings: Iterable[Drawing], n_tokens: int, *, score: bool = False) -> Steps:
        drawings = list(drawings)
        return cls(
            any(drawing.guidance_scale is not None for drawing in drawings),
            any(drawing.top_k is not None and drawing.top_k < n_tokens for drawing in drawings),
            any(drawing.top_p is not None and drawing.top_p < 1 for drawing in drawings),
            score,
        )

    def __or__(self, other: Steps) -> Steps:
        return Steps(*(a or b for a, b in zip(vars(self).values(), vars(other).values())))


def repeated(drawing: Drawing, n: int, device: torch.device | str) -> Drawings:
    """n canvases that are drawn in one way. Filled, not copied: that waits for nothing and may be captured."""
    found = Drawings([drawing])
    for name, column in vars(found).items():
        setattr(found, name, torch.full((n,), column.item(), dtype=column.dtype, device=device))
    return found


@dataclass(frozen=True)
class Canvases:
    """n canvases; of those that are guided, lane b reads the prefix and lane n + b the negative one.

    canvas: int32 [n, n_positions], −1 = not decided yet. pass_starts: int8 [n, n_positions]. position: int32 [n], the
    first that is not decided. end: int32 [n], where drawing ends for now: a canvas is idle when its position is there.
    slots: int32 [2 n], where the cache takes the input that scores `position`, −1 = idle. offset: int32 [2 n], slot =
    position − offset. index: int64 [n], image index of the noise contract. guided, scored: int32 [n], 0 or 1.
    log_likelihood: float64 [n], nats of known tokens of scored canvases. failed: int32 [n], 1 where the logits at
    `position` were not finite.
    """

    canvas: torch.Tensor
    pass_starts: torch.Tensor
    position: torch.Tensor
    end: torch.Tensor
    slots: torch.Tensor
    offset: torch.Tensor
    index: torch.Tensor
    guided: torch.Tensor
    scored: torch.Tensor
    log_likelihood: torch.Tensor
    failed: torch.Tensor
    drawings: Drawings

    @classmethod
    def idle(cls, n: int, n_positions: int, device: torch.device | str) -> Canvases:
        """n canvases with nothing to draw."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        position, failed = zeros(2, n)  # in one tensor, so that one copy reports both
        return cls(
            canvas=zeros(n, n_positions) - 1, pass_starts=zeros(n, n_positions, dtype=torch.int8), position=position,
            end=zeros(n), slots=zeros(2 * n) - 1, offset=zeros(2 * n), index=zeros(n, dtype=torch.int64),
            guided=zeros(n), scored=zeros(n), log_likelihood=zeros(n, dtype=torch.float64), failed=failed,
            drawings=repeated(Drawing(), n, device),
        )  # fmt: skip

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
