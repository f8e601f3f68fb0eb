"""Which guesses need the fewest passes: fixed-point sampling with each way of guessing, counted.

    python benchmarks/guessers.py                # the table of results/windows.md
    python benchmarks/guessers.py --images 4 --windows 8
    python benchmarks/guessers.py --model my-scenes --guidance-scale 3 --temperature 0.8    # after captions

The loop is the portable engine's own, with its guesses replaced; the last two rows are the guesses that the engines
make. A guess changes no token: every run is held to the tokens of window 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

import fastigpt
from fastigpt.engine import loop
from fastigpt.engine.portable import PortableEngine
from fastigpt.engine.portable.session import PortableSession
from fastigpt.engine.window import WindowTuner
from fastigpt.sampling import gumbel_noise
from fastigpt.training.evaluate import held_out

SEED = 11


class Study(PortableSession):
    """The portable engine's session with the guesses of `rule`, which sees the scores of all positions so far, divided
    by the temperature."""

    def __init__(
        self, engine: PortableEngine, capacity: int, width: int, rule: Rule | None, temperature: float
    ) -> None:
        super().__init__(engine.blocks, capacity, WindowTuner(width), None)
        self.rule, self.columns, self.rows = rule, engine.spec.columns, slice(0)
        self.logs = torch.zeros(capacity, self.n_positions + 1, engine.spec.n_tokens)
        score = self.reader.logits

        def recorded(tokens: torch.Tensor, position: torch.Tensor, *how: Any) -> torch.Tensor:
            logits = score(tokens, position, *how)
            place = position[:, None] + torch.arange(tokens.shape[1])
            logs = (logits / temperature).log_softmax(-1)
            self.logs[torch.arange(len(tokens))[:, None], place.clamp(max=self.n_positions)] = logs
            return logits

        self.reader.logits = recorded  # type: ignore[method-assign]

    def _copy(self, sources: Sequence[int], targets: Sequence[int], positions: int | None = None) -> None:
        super()._copy(sources, targets, positions)
        self.logs[list(targets)] = self.logs[list(sources)]

    def _guess(self, rows: slice, width: int) -> None:
        if self.rule is None:
            return super()._guess(rows, width)
        self.rows = rows
        for place in range(width - 1):
            at = (self.canvases.position[rows] + place).clamp(max=self.n_positions)
            self.canvases.guess(rows, at[:, None], self.rule(self, at)[:, None])

    @property
    def scored(self) -> torch.Tensor:
        """One past the last position that has scores; [n]."""
        return self.canvases.scored[self.rows]

    def token(self, at: torch.Tensor) -> torch.Tensor:
        """Tokens there: decided, drawn by the last pass, or guessed; [n]."""
        return self.canvases.tokens[self.rows].gather(1, at.clamp(min=0)[:, None])[:, 0]

    def drawn(self, at: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """What the last pass drew there, or `fresh` where it drew nothing."""
        return torch.where(at < self.scored, self.token(at), fresh)

    def draw_from(self, logs: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """The draw with these log-probabilities [n, n_tokens] and the positions' own noise."""
        return (logs + gumbel_noise(SEED, self.canvases.index[self.rows], at, logs.shape[-1])).argmax(-1)

    def scores(self, at: torch.Tensor) -> torch.Tensor:
        """Log-probabilities there, as they were scored last; [n, n_tokens]."""
        return self.logs[torch.arange(len(at)), at.clamp(min=0)]

    def last(self) -> torch.Tensor:
        """Log-probabilities of the last position that was scored."""
        return self.scores(self.scored.clamp(max=self.n_positions) - 1)

    def above(self, at: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the position above; in the first row, of the last position."""
        up = at - self.columns
        return torch.where((up >= 0)[:, None], self.scores(up), self.last())


Rule = Callable[[Study, torch.Tensor], torch.Tensor]


def mixed(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """log of share · exp(a) + (1 − share) · exp(b)."""
    return torch.logaddexp(a + math.log(share), b + math.log(1 - share))


def left(study: Study, at: torch.Tensor) -> torch.Tensor:
    return study.token(at - 1)


def corrected(study: Study, at: torch.Tensor) -> torch.Tensor:
    """A draw that repeats the wrong guess becomes the token drawn in its place; where nothing was drawn, left."""
    y = study.drawn(at, left(study, at))
    right = study.token(study.canvases.position[study.rows] - 1)
    return torch.where((y == study.canvases.wrong[study.rows]) & (at < study.scored), right, y)


def draws_mixed_with_above(study: Study, at: torch.Tensor) -> torch.Tensor:
    y = study.draw_from(mixed(study.above(at), study.scores(at), 0.3), at)
    return torch.where(at < study.scored, y, left(study, at))


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
    parser.add_argument("--model", help="default: the bundled model")
    parser.add_argument("--guidance-scale", type=float, help="after captions of held-out scenes; default: without")
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    n, windows = options.images, options.windows
    torch.set_num_threads(1)  # the tensors are small
    portable = fastigpt.load(options.model, device="cpu", backend="portable", dtype="float32")
    cpu = fastigpt.load(options.model, device="cpu", backend="cpu", dtype="float32")
    engine, positions = cast(PortableEngine, portable.engine), portable.spec.n_positions
    drawing: dict[str, Any] = {"seed": SEED, "temperature": options.temperature}
    if options.guidance_scale is not None:
        drawing |= {"prompt": held_out(n).captions, "guidance_scale": options.guidance_scale}
    requests = cpu.requests(torch.full((n, positions), -1), **drawing)
    expected = loop.run(cpu.engine, requests, window=1)[0].tokens
    print(f"{n} images, passes per image (tokens per pass)\n")
    print("| draws not kept; other positions | " + " | ".join(f"window {w}" for w in windows) + " |")
    print("|---|" + "---|" * len(windows))
    for name, rule in RULES.items():
        cells = []
        for width in windows:
            study = Study(engine, n, width, rule, options.temperature)
            slots = study.add(requests)
            while any(advance.decided < positions for advance in study.step(loop.SLICE)):
                pass
            filled = study.read(slots)
            assert torch.equal(filled.tokens, expected), "a guess changed a token"
            passes = float(filled.pass_starts.sum(1).double().mean())
            cells.append(f"{passes:.0f} ({positions / passes:.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    cells = []
    for width in windows:
        _, stats = cpu.sample(n, window=width, output_type="tokens", return_stats=True, **drawing)
        passes = float(stats.passes.double().mean())
        cells.append(f"{passes:.0f} ({positions / passes:.2f})")
    print("| the same, after tokens seen in the same surroundings (cpu engine) | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
