"""Guesses for a window: what the next tokens may turn out to be, so that one pass can decide several of them.

A guess that the draw repeats is right, because a draw's noise is fixed; a wrong one costs nothing but its place.
"""

from __future__ import annotations

import torch

from fastigpt.engine.portable.canvases import Canvases
from fastigpt.engine.portable.reader import DraftReader
from fastigpt.sampling import draw


def from_last_pass(canvases: Canvases, rows: slice, width: int) -> None:
    """What the last pass drew there, except that a draw which repeats the token that turned out wrong, and every
    position not drawn yet, takes the token to its left."""
    n, device = canvases.n_positions, canvases.device
    place = canvases.position[rows, None].to(device) + torch.arange(-1, width - 1, device=device)
    at = place.clamp(0, n)
    drawn = canvases.tokens[rows].gather(1, at)
    copies = (place >= canvases.scored[rows, None]) | (drawn == canvases.wrong[rows, None])
    copies &= (place < n) & ~canvases.known[rows].gather(1, at)
    copies[:, 0] = False
    source = torch.arange(width, device=device).expand_as(place).masked_fill(copies, 0).cummax(1).values
    canvases.guess(rows, at[:, 1:], drawn.gather(1, source)[:, 1:])


def from_draft(canvases: Canvases, draft: DraftReader, rows: slice, width: int) -> None:
    """What a smaller model draws there, one position after the other, with the same noise."""
    position = canvases.position[rows]
    # Of the tokens decided since its last pass it may not have read the last two. At position 0 there is but one input.
    first = (position - 1).clamp(min=0)
    drawings, index = canvases.drawings.rows(rows), canvases.index[rows]
    logits = draft.logits(canvases.inputs(rows, first, 2), first, rows, drawings.guidance_scale)
    logits = logits[torch.arange(len(position), device=canvases.device), (position - first).to(canvases.device)]
    for place in range(width - 1):
        at = position + place
        guess = draw(logits, index, at.to(canvases.device), drawings)
        canvases.guess(rows, at.clamp(max=canvases.n_positions).to(canvases.device)[:, None], guess[:, None])
        if place + 2 < width:
            logits = draft.logits(canvases.inputs(rows, at + 1, 1), at + 1, rows, drawings.guidance_scale)[:, 0]
