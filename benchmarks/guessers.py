"""Which guesses need the fewest passes: fixed-point sampling with each way of guessing, counted.

    python benchmarks/guessers.py                # the table of results/windows.md
    python benchmarks/guessers.py --images 4 --windows 8

The loop is the portable engine's own, with its guesses replaced; the last two rows are the guesses that the engines
make. A guess changes no token: every run is held to the tokens of window 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import cast

import torch

import fastigpt
from fastigpt.engine import Drawing, Job
from fastigpt.engine.portable import PortableEngine, _Wave
from fastigpt.sampling import gumbel_noise


class Study(_Wave):
    """The portable engine's loop with the guesses of `rule`, which sees the scores of all positions so far."""

    def __init__(self, engine: PortableEngine, job: Job, width: int, rule: Rule | None) -> None:
        super().__init__(engine, job, width)
        self.rule, self.columns = rule, engine.config.width
        self.logs = torch.zeros(len(job.tokens), engine.config.n_pixels + width, engine.config.n_colors)
        score = self.lanes.logits

        def recorded(ids: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
            logits = score(ids, first)
            slots = first[:, None] + torch.arange(ids.shape[1])
            self.logs[self.alive[:, None], slots] = logits.log_softmax(-1)
            return logits

        self.lanes.logits = recorded  # type: ignore[method-assign]

    def _guess(self, width: int) -> None:
        if self.rule is None:
            return super()._guess(width)
        for place in range(width - 1):
            slots = self.position[self.alive] + place
            self._note_guesses(self.alive, slots, self.rule(self, slots))

    def token(self, slots: torch.Tensor) -> torch.Tensor:
        """Tokens there: decided, drawn by the last pass, or guessed; [n]."""
        return self.guesses[self.alive, slots.clamp(min=0)]

    def drawn(self, slots: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """What the last pass drew there, or `fresh` where it drew nothing."""
        return torch.where(slots < self.scored[self.alive], self.token(slots), fresh)

    def draw_from(self, logs: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The draw with these log-probabilities [n, n_colors] and the positions' own noise."""
        noise = gumbel_noise(self.drawing.seed, self.index[self.alive], slots, logs.shape[-1])
        return (logs + noise).argmax(-1)

    def last(self) -> torch.Tensor:
        """Log-probabilities of the last position that was scored."""
        return self.logs[self.alive, (self.scored[self.alive] - 1).clamp(min=0)]

    def above(self, slots: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the position above; in the first row, of the last position."""
        up = slots - self.columns
        return torch.where((up >= 0)[:, None], self.logs[self.alive, up.clamp(min=0)], self.last())


Rule = Callable[[Study, torch.Tensor], torch.Tensor]


def mixed(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """log of share · exp(a) + (1 − share) · exp(b)."""
    return torch.logaddexp(a + math.log(share), b + math.log(1 - share))


def left(study: Study, slots: torch.Tensor) -> torch.Tensor:
    return study.token(slots - 1)


def corrected(study: Study, slots: torch.Tensor) -> torch.Tensor:
    """A draw that repeats the wrong guess becomes the token drawn in its place; where nothing was drawn, left."""
    y = study.drawn(slots, left(study, slots))
    right = study.tokens[study.alive, (study.position[study.alive] - 1).clamp(min=0)]
    return torch.where((y == study.wrong[study.alive]) & (slots < study.scored[study.alive]), right, y)


def draws_mixed_with_above(study: Study, slots: torch.Tensor) -> torch.Tensor:
    y = study.draw_from(mixed(study.above(slots), study.logs[study.alive, slots], 0.3), slots)
    return torch.where(slots < study.scored[study.alive], y, left(study, slots))


RULES: dict[str, Rule | None] = {
    "draws; last logits + noise (before)": lambda s, p: s.drawn(p, s.draw_from(s.last(), p)),
    "draws; token above": lambda s, p: s.drawn(p, s.token(p - s.columns)),
    "draws; logits above + noise": lambda s, p: s.drawn(p, s.draw_from(s.above(p), p)),
    "draws; last and above, mean of logs": lambda s, p: s.drawn(p, s.draw_from((s.last() + s.above(p)) / 2, p)),
    "draws; last and above, mean": lambda s, p: s.drawn(p, s.draw_from(mixed(s.last(), s.above(p), 0.5), p)),
    "draws; left": lambda s, p: s.drawn(p, left(s, p)),
    "left, draws forgotten": left,
    "draws mixed with logits above; left": draws_mixed_with_above,
    "draws, wrong token replaced; left": corrected,
    "draws, wrong token becomes left; left (portable engine)": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8, 16])
    options = parser.parse_args()
    n, windows = options.images, options.windows
    torch.set_num_threads(1)  # the tensors are small
    portable = fastigpt.load(device="cpu", backend="portable", dtype="float32")
    cpu = fastigpt.load(device="cpu", backend="cpu", dtype="float32")
    drawing, pixels = Drawing(seed=11), portable.config.n_pixels
    job = Job(torch.full((n, pixels), -1), torch.arange(n), torch.zeros(n, dtype=torch.int64), None, drawing, 1)
    expected = cpu.engine.fill(job).tokens
    print(f"{n} images, passes per image (tokens per pass)\n")
    print("| draws not kept; other positions | " + " | ".join(f"window {w}" for w in windows) + " |")
    print("|---|" + "---|" * len(windows))
    for name, rule in RULES.items():
        cells = []
        for width in windows:
            with torch.inference_mode():
                study = Study(cast(PortableEngine, portable.engine), job, width, rule)
                while study.finished_rows() < portable.config.height:
                    study.advance(width)
            assert torch.equal(study.tokens, expected), "a guess changed a token"
            passes = float(study.pass_starts.sum(1).double().mean())
            cells.append(f"{passes:.0f} ({pixels / passes:.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    cells = []
    for width in windows:
        _, stats = cpu.sample(n, seed=11, window=width, output_type="tokens", return_stats=True)
        passes = float(stats.passes.double().mean())
        cells.append(f"{passes:.0f} ({pixels / passes:.2f})")
    print("| the same, after tokens seen in the same surroundings (cpu engine) | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
