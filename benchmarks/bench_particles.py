"""What particles buy and cost: held-out scenes with a hole in the middle, completed with more and more candidates.

    pytest benchmarks/bench_particles.py --benchmark-only
    python benchmarks/bench_particles.py

The first times a result. The second prints the table of results/particles.md: log-likelihood of the known cells that
follow the hole and of the whole result, in nats per image, and seconds per result.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial

import numpy as np
import pytest
import torch

import fastigpt
from fastigpt.bench.timing import timed
from fastigpt.scenes import scenes
from fastigpt.training.data import HELD_OUT_SEED

HOLES = {"square": (slice(8, 24), slice(8, 24)), "left side": (slice(8, 24), slice(0, 16))}


def held_out(n: int) -> np.ndarray:
    """Scenes the bundled model has not seen, uint8 [n, H, W, 3]."""
    return np.stack([image for image, _, _ in itertools.islice(scenes(HELD_OUT_SEED, 20_000), n)])


def hole_in(model: fastigpt.ImageGPT, name: str) -> np.ndarray:
    """bool [H, W], True where it is drawn anew."""
    mask = np.zeros((model.config.height, model.config.width), bool)
    mask[HOLES[name]] = True
    return mask


@pytest.mark.parametrize("particles", [1, 4, 16])
def bench_completion(benchmark, device, particles):
    """One result of one scene with a square hole."""
    benchmark.group = "completion of a square hole"
    model = fastigpt.load(device=device)
    options = {"mask": hole_in(model, "square"), "particles": particles, "seed": 0, "output_type": "tokens"}
    benchmark.pedantic(partial(model.complete, held_out(1), **options), rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("-n", type=int, default=24, help="scenes")
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--hole", choices=HOLES, default="square")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = fastigpt.load(options.model)
    images, mask = held_out(options.n), hole_in(model, options.hole)
    known_after = torch.from_numpy(~mask.ravel() & (mask.ravel().cumsum() > 0))

    def nats(tokens: torch.Tensor) -> torch.Tensor:
        """float64 [n, H·W]: log-likelihood of each cell."""
        parts = [
            model.logits(part).cpu().double().log_softmax(-1).gather(2, part[..., None]) for part in tokens.split(8)
        ]
        return torch.cat(parts)[..., 0]

    print(f"{model}, {options.n} scenes, hole: {options.hole}")
    print(
        "| k | known cells after the hole | hole | whole image | gain over k = 1 ± its standard error | s per result |"
    )
    print("|---|---|---|---|---|---|")
    plain = None
    for k in options.particles:
        job = partial(model.complete, images, mask=mask, particles=k, seed=options.seed, output_type="tokens")
        tokens, seconds = timed(job, model.device)
        _row(str(k), nats(tokens), mask, known_after, plain, f"{seconds / options.n:.2f}")
        plain = nats(tokens) if plain is None else plain
    _row("the scene itself", nats(model.encode(images)), mask, known_after, plain, "–")


def _row(
    name: str, cells: torch.Tensor, mask: np.ndarray, after: torch.Tensor, plain: torch.Tensor | None, seconds: str
):
    known, hole, whole = cells[:, after].sum(1), cells[:, torch.from_numpy(mask.ravel())].sum(1), cells.sum(1)
    gain = "–"
    if plain is not None:
        difference = whole - plain.sum(1)
        gain = f"{difference.mean():.1f} ± {difference.std() / len(difference) ** 0.5:.1f}"
    print(f"| {name} | {known.mean():.1f} | {hole.mean():.1f} | {whole.mean():.1f} | {gain} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
