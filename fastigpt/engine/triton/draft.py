"""A smaller model that guesses the windows: a batch of its own for the same canvases, which draws a window's guesses
one at a time with the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fastigpt.engine.triton.batch import Batch
from fastigpt.engine.triton.passes import Kind, Passes
from fastigpt.engine.triton.weights import Model
from fastigpt.job import Request
from fastigpt.spec import ModelSpec


def as_read_by(spec: ModelSpec, model: ModelSpec, request: Request) -> Request:
    """The request as a draft sees it. One that has other prefixes than the model guesses without them."""
    request = replace(request, stop=None, score=False)
    if (spec.n_prefix_tokens, spec.prefix_length) == (model.n_prefix_tokens, model.prefix_length):
        return request
    drawing = replace(request.drawing, guidance_scale=None)
    return replace(request, prefix=spec.unconditional, negative=None, drawing=drawing)


class Draft:
    """Of the batch that draws: the same slots hold the same canvases."""

    def __init__(self, model: Model, batch: Batch) -> None:
        self.batch, self._drawn = Batch(model, batch.n), batch.seats.canvases
        self._spec = batch.model.spec
        self._fresh = torch.ones(batch.n, dtype=torch.bool, device=model.device)

    @property
    def kind(self) -> Kind:
        return self.batch.kind

    def place(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        spec = self.batch.model.spec
        seen = [as_read_by(spec, self._spec, request) for request in requests]
        self.batch.place(slots, seen, [spec.n_positions] * len(slots))

    def prepare(self) -> None:
        """What `guess` needs and a capture must not make."""
        self.batch.passes_of(1)

    def guess(self, passes: Passes) -> None:
        """Replaces the guesses among the inputs of a pass. Nothing of it visits the host, so it can be captured."""
        mine, drawn = self.batch.seats.canvases, self._drawn
        mine.canvas.copy_(drawn.canvas)
        mine.position.copy_(drawn.position)
        # Guesses go as far as the canvas does, those of idle canvases nowhere.
        mine.end.copy_(torch.where(drawn.position < drawn.end, mine.canvas.shape[1], 0))
        live = (mine.position < mine.end).repeat(2)
        live[len(mine.guided) :] &= mine.guided != 0
        mine.slots.copy_(torch.where(live, mine.position.repeat(2) - mine.offset, -1))
        one = self.batch.passes[1, self.batch.steps.guided]
        one.enter(None, self._fresh)
        # One pass more than there are guesses: where all of them stand, the last has been read as well.
        for _ in range(passes.width):
            one.one_pass(self.kind)
        guessed = drawn.position[:, None].long() + torch.arange(passes.width - 1, device=mine.canvas.device)
        guesses = mine.canvas.gather(1, guessed.clamp(max=mine.canvas.shape[1] - 1))
        passes.inputs[:, 1:] = guesses.clamp(min=0)
        passes.embed()
