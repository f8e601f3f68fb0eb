"""The end of a pass in plain PyTorch, canvas by canvas: the twin of kernels/sample_head.py, windows included."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastigpt.formulas import rms_norm
from fastigpt.kernels.canvases import Canvases, Head
from fastigpt.sampling import draw, guide


def scores_reference(x: torch.Tensor, head: Head) -> torch.Tensor:
    """Logits float32 [rows, tokens] from hidden states [rows, width]."""
    h = rms_norm(x.float(), head.gain.float(), head.epsilon)
    if head.inner_weight is not None:
        h = F.gelu(_linear(h, head.inner_weight, head.inner_bias))
    return _linear(h, head.weight, head.bias)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight.float(), None if bias is None else bias.float())


def decisions_reference(x: torch.Tensor, head: Head, canvases: Canvases, window: int) -> tuple[torch.Tensor, ...]:
    """int64 [n, 2 W − 1]: the draw at each position of the windows and behind them, from the last row's logits; and the
    logits, float32 [n, W, tokens], guided where a canvas is. x: as the kernel takes it."""
    n, drawings = len(canvases.index), canvases.drawings
    logits = scores_reference(x, head).view(-1, n, window, len(head.weight))
    mixed = logits[0]
    if len(logits) == 2:
        guided = guide(logits[0], logits[1], drawings.guidance_scale[:, None, None])
        mixed = torch.where(canvases.guided[:, None, None] != 0, guided, mixed)
    position = canvases.position[:, None] + torch.arange(2 * window - 1, device=x.device)
    ahead = mixed[:, -1:].expand(-1, window - 1, -1)
    return draw(torch.cat([mixed, ahead], 1), canvases.index[:, None], position, drawings), mixed


def pass_end_reference(x: torch.Tensor, inputs: torch.Tensor, head: Head, canvases: Canvases) -> None:
    """What the kernel does with its arguments; x and inputs of canvases that are idle mean nothing."""
    n, window = inputs.shape
    state, n_positions = canvases, canvases.canvas.shape[1]
    decided, logits = decisions_reference(x, head, canvases, window)
    for b in range(n):
        start, stop = int(state.position[b]), int(state.end[b])
        if start >= stop:
            continue
        positions = start + torch.arange(2 * window - 1, device=x.device)
        inside = positions < n_positions
        known = torch.where(inside, state.canvas[b, positions.clamp(max=n_positions - 1)].long(), -1)
        follow = torch.where(known >= 0, known, decided[b])
        right = (follow[: window - 1] == inputs[b, 1:]).long().cumprod(0)
        kept = min(1 + int(right.sum()), stop - start)
        finite = int(torch.isfinite(logits[b]).all(-1).long().cumprod(0).sum())
        if finite < kept:
            state.failed[b], kept = 1, finite
        if state.scored[b]:
            nats = logits[b].log_softmax(-1).gather(-1, known[:window, None].clamp(min=0))[:, 0]
            state.log_likelihood[b] += (nats.double() * (known[:window] >= 0))[:kept].sum()
        state.canvas[b, start : start + kept] = follow[:kept].int()
        state.pass_starts[b, start] = 1
        after = start + kept
        state.position[b] = after
        for lane in (b, n + b) if state.guided[b] else (b,):
            state.slots[lane] = after - state.offset[lane] if after < stop else -1
        if kept > 0 and after < n_positions:
            inputs[b] = follow[kept - 1 : kept - 1 + window].int()
            at = (after + torch.arange(window, device=x.device)).clamp(max=n_positions - 1)
            embedded = head.wte[inputs[b].long()].float()
            if head.wpe is not None:
                embedded = embedded + head.wpe[at].float()
            x.view(-1, n, window, x.shape[-1])[:, b] = embedded
