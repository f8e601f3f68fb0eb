"""What is asked of an engine, one canvas at a time, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastigpt.sampling import Drawing


@dataclass(frozen=True)
class Request:
    """One canvas to be drawn. Its result depends on nothing but this, the weights and the engine's arithmetic.

    tokens: int64 [n_positions] on the CPU, −1 = draw, the rest is kept. index: the image index of the noise contract,
    0 … 2⁶³ − 1. drawing: how this canvas is drawn. prefix: ids that are read before the first token, 1 to
    spec.prefix_length of them. negative: the prefix that guidance leads away from; given if and only if
    drawing.guidance_scale is. stop: tokens before this position are drawn, those behind it are left as they are.
    score: whether the log-likelihood of known tokens behind unknown ones is summed up.
    """

    tokens: torch.Tensor
    index: int
    drawing: Drawing
    prefix: tuple[int, ...]
    negative: tuple[int, ...] | None = None
    stop: int | None = None
    score: bool = False


@dataclass(frozen=True)
class Filled:
    """Canvases, finished or as far as they are.

    tokens: int64 [n, n_positions], −1 where nothing is decided yet. pass_starts: bool [n, n_positions], True where a
    pass of that canvas began: its sum over a canvas is the passes it took after its prefill. log_likelihood: float64
    [n], in nats: of the known tokens behind the first unknown one that have been passed, under the model's own
    distribution (guided, at temperature 1, unfiltered); 0 where the request did not ask for it.
    """

    tokens: torch.Tensor
    pass_starts: torch.Tensor
    log_likelihood: torch.Tensor

    def canvas(self, i: int) -> Filled:
        """Canvas i alone."""
        return Filled(self.tokens[i : i + 1], self.pass_starts[i : i + 1], self.log_likelihood[i : i + 1])


@dataclass(frozen=True, repr=False)
class Stats:
    """What a job took.

    seed: the seed it drew with. drawn: bool [n, h, w], the grid of tokens, True where one was drawn. pass_starts: bool
    [n, h, w], True where a pass of the model began. passes: int64 [n], their sum. seconds: wall time, prefill
    included. batch: how many images were drawn side by side.
    """

    seed: int
    drawn: torch.Tensor
    pass_starts: torch.Tensor
    seconds: float
    batch: int

    @property
    def passes(self) -> torch.Tensor:
        return self.pass_starts.flatten(1).sum(1)

    @property
    def tokens_per_pass(self) -> float:
        """Drawn tokens that a pass decided, on average over all images."""
        return float(self.drawn.sum()) / max(1, int(self.pass_starts.sum()))

    @property
    def seconds_per_pass(self) -> float:
        """Of the images that are drawn side by side together, prefill included."""
        return self.seconds * self.batch / max(1, int(self.pass_starts.sum()))

    @property
    def images_per_second(self) -> float:
        return len(self.drawn) / self.seconds

    def __repr__(self) -> str:
        n, passes = len(self.drawn), float(self.passes.double().mean())
        return (
            f"Stats(seed {self.seed}: {n} image{'' if n == 1 else 's'} in {self.seconds:.3g} s, "
            f"{self.images_per_second:.3g} images/s; {passes:.0f} passes per image, "
            f"{self.tokens_per_pass:.1f} tokens and {1e3 * self.seconds_per_pass:.3g} ms each)"
        )
