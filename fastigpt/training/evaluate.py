"""How good a model of scenes is: `python -m fastigpt.training.evaluate` prints the table of the model card.

What tokens keep of a picture, held-out nats per token, how many of the facts a prompt asks for are in the picture (as
describe.py reads it), whether completions keep what the given half shows, whether samples are new and differ from each
other, and what linear probes find in the layers of a model of pixels. Pictures larger than 32 × 32 are averaged down
before they are described or compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import fastigpt
from fastigpt import probe, probe_data
from fastigpt.model import Model
from fastigpt.scenes import scenes
from fastigpt.scenes.captions import parse
from fastigpt.scenes.describe import confirmed, describe
from fastigpt.scenes.world import Scene
from fastigpt.training.data import HELD_OUT_SEED

DRAWINGS = ((1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (2.0, 0.8))  # guidance and temperature; the last is recommended
TRAINING_SEEDS = (0, 1)  # of the bundled model: of its first training and of the one that went on from there
DRAWINGS_128 = ((1.0, 1.0), (3.0, 1.0), (2.0, 0.8), (3.0, 0.8), (4.0, 0.7), (3.0, 0.6))  # likewise
TRAINING_SEEDS_128 = (0,)
_FIRST_FRESH = 10_000  # held-out scenes before this one are what training logs its losses on
_RENDERINGS = 4000


@dataclass(frozen=True)
class Drawn:
    """Held-out scenes. images: uint8 [n, side, side, 3]."""

    images: np.ndarray
    captions: list[str]
    scenes: list[Scene]


def held_out(n: int, first: int = _FIRST_FRESH, side: int = 32) -> Drawn:
    return _draw(HELD_OUT_SEED, first, n, side)


def _draw(seed: int, first: int, n: int, side: int = 32) -> Drawn:
    images, captions, facts = zip(*itertools.islice(scenes(seed, first, side), n))
    return Drawn(np.stack(images), list(captions), list(facts))


def _side(model: Model) -> int:
    return model.codec.size[0] if model.codec is not None else 32


def small(images: np.ndarray) -> np.ndarray:
    """uint8 [n, 32, 32, 3] of images uint8 [n, side, side, 3], averaged down."""
    scale = images.shape[1] // 32
    means = images.reshape(len(images), 32, scale, 32, scale, 3).mean((2, 4))
    return means.round().astype(np.uint8)


def evaluate(model: Model, *, n: int = 64, n_probe: int = 1000, seed: int = 0) -> dict[str, Any]:
    """All figures, n images for each, n_probe for the probes, of 32 × 32 models only. Nats are per token; shares and
    accuracies lie in [0, 1]; distances are root mean squares of the difference of two pictures in steps of 1/255.
    Raises ValueError if the model cannot read the scenes' prompts or n_probe images are too few for a probe."""
    if n < 2:
        raise ValueError(f"n must be at least 2, not {n!r}")
    if model.reader is None:
        raise ValueError(f"{model.name!r} reads no prompts")
    drawings = DRAWINGS if _side(model) == 32 else DRAWINGS_128
    figures = {
        "reconstruction": reconstruction(model, n),
        "nats": nats(model, held_out(n, side=_side(model))),
        "reader": reader_accuracy(model, 2000),
        "prompts": {
            f"guidance {scale}, temperature {temperature}": prompt_following(model, n, scale, seed, temperature)
            for scale, temperature in drawings
        },
        "completion": completion(model, n, seed),
        "diversity": diversity(model, n, seed),
    }
    if _side(model) == 32:
        labelled = probe_data.load("scenes", n_probe, model.config.height, model.config.width)
        figures["probes"] = probe.as_dict(model, labelled, probe.probe(model, labelled, seed=seed))
    return figures


def reconstruction(model: Model, n: int) -> dict[str, float]:
    """What is left of held-out renderings as tokens: mean peak signal to noise in dB, mean absolute error of 255."""
    images = held_out(n, side=_side(model)).images
    error = model.decode(model.encode(images)).astype(np.float64) - images
    noise = np.square(error).mean((1, 2, 3)).clip(min=1e-9)
    return {"dB": float((10 * np.log10(255**2 / noise)).mean()), "error": float(np.abs(error).mean())}


def nats(model: Model, drawn: Drawn) -> dict[str, float]:
    tokens = model.encode(drawn.images)
    return {
        "without caption": float(model.nll(tokens).mean()),
        "with caption": float(model.nll(tokens, prompt=drawn.captions).mean()),
    }


def reader_accuracy(model: Model, n: int) -> dict[str, float]:
    """Share of facts that describe() gets right on real renderings in the model's palette, by fact and over all."""
    drawn = held_out(n, side=_side(model))
    seen = small(model.decode(model.encode(drawn.images)))
    return _shares([confirmed(scene.facts(), found) for scene, found in zip(drawn.scenes, describe(seen))])


def prompt_following(
    model: Model, n: int, guidance_scale: float, seed: int, temperature: float = 1.0
) -> dict[str, float]:
    """Share of the facts stated by n captions that describe() confirms in the images drawn for them."""
    captions = held_out(n).captions
    images = model.sample(
        n, prompt=captions, guidance_scale=guidance_scale, temperature=temperature, seed=seed, output_type="np"
    )
    return _shares([confirmed(parse(text), found) for text, found in zip(captions, describe(small(images)))])


def completion(model: Model, n: int, seed: int) -> dict[str, float]:
    """Share of the facts that the top half of a scene shows and that its completion keeps: scenes with one big subject,
    of which the top half shows the sky, the place, and enough of the subject to tell its kind and colour."""

    def telling(scene: Scene) -> bool:
        subject = scene.subjects[0]
        return scene.relation is None and subject.size == "big" and subject.kind not in ("car", "mountain")

    drawn = held_out(20 * n, side=_side(model))
    picked = [k for k, scene in enumerate(drawn.scenes) if telling(scene)][:n]
    rows = 16 if model.codec is None else model.codec.grid[0] // 2
    images = model.complete(drawn.images[picked], rows=rows, seed=seed, output_type="np")
    asked = [
        {name: value for name, value in drawn.scenes[k].facts().items() if name in ("sky", "side", "kind", "color")}
        for k in picked
    ]
    return _shares([confirmed(facts, found) for facts, found in zip(asked, describe(small(images)))])


def diversity(model: Model, n: int, seed: int) -> dict[str, float]:
    """Mean distance to the nearest of 4,000 training renderings (as many of each training) and to the nearest other of
    the n images: for n samples drawn without a prompt, and beside them for n held-out renderings, which neither
    memorise nor collapse."""
    side = _side(model)
    seeds = TRAINING_SEEDS if side == 32 else TRAINING_SEEDS_128
    shown = [_draw(training, 0, _RENDERINGS // len(seeds), side).images for training in seeds]
    trained = small(model.decode(model.encode(np.concatenate(shown))))
    real = small(model.decode(model.encode(held_out(n, side=side).images)))
    samples = small(model.sample(n, seed=seed, output_type="np"))
    return {
        "samples to training": _nearest(samples, trained),
        "held-out to training": _nearest(real, trained),
        "among samples": _nearest(samples, None),
        "among held-out": _nearest(real, None),
    }


def _nearest(images: np.ndarray, others: np.ndarray | None) -> float:
    """Mean over the images of the distance to the nearest of the others (None: to the nearest other of themselves)."""
    a = torch.from_numpy(images).flatten(1).double()
    b = a if others is None else torch.from_numpy(others).flatten(1).double()
    # From the differences themselves: |a|² − 2ab + |b|² cancels where pictures are nearly the same, which is the point.
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    if others is None:
        distances.fill_diagonal_(torch.inf)
    return float(distances.amin(1).mean()) / a.shape[1] ** 0.5


def _shares(checked: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Share of facts that hold, "all" first, then by name."""
    names = dict.fromkeys(name for facts in checked for name in facts)
    shares = {name: [facts[name] for facts in checked if name in facts] for name in names}
    every = [held for facts in checked for held in facts.values()]
    return {"all": float(np.mean(every))} | {name: float(np.mean(held)) for name, held in shares.items()}


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    nll, diverse = figures["nats"], figures["diversity"]
    kept = figures["reconstruction"]
    lines = [
        "| held-out renderings as tokens | peak signal to noise, dB | mean absolute error of 255 |",
        "|---|---|---|",
        f"| | {kept['dB']:.2f} | {kept['error']:.2f} |",
        "",
        "| held-out nats per token | without caption | with caption |",
        "|---|---|---|",
        f"| | {nll['without caption']:.4f} | {nll['with caption']:.4f} |",
        "",
        "| facts confirmed, % | all | sky | ground | kind | colour | size | side, relation | 2nd kind, colour, size |",
        "|---|---|---|---|---|---|---|---|---|",
        _facts_row("reader on renderings", figures["reader"]),
        *(_facts_row(f"prompts, {drawing}", shares) for drawing, shares in figures["prompts"].items()),
        _facts_row("completion of the top half", figures["completion"]),
        "",
        "| nearest neighbour, RMS of 255 | to 4,000 training renderings | among themselves |",
        "|---|---|---|",
        f"| samples | {diverse['samples to training']:.1f} | {diverse['among samples']:.1f} |",
        f"| held-out renderings | {diverse['held-out to training']:.1f} | {diverse['among held-out']:.1f} |",
    ]
    if "probes" in figures:
        lines += ["", probe.table([probe.Probe(**each) for each in figures["probes"]["probes"]])]
    return "\n".join(lines)


def _facts_row(name: str, shares: dict[str, float]) -> str:
    columns = ("all", "sky", "ground", "kind", "color", "size", "side relation", "kind2 color2 size2")
    cells = [", ".join(f"{100 * shares[key]:.1f}" for key in keys.split() if key in shares) or "–" for keys in columns]
    return f"| {name} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastigpt.training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint directory or hub id (default: the bundled model)")
    parser.add_argument("-n", type=int, default=64, help="images for each figure (default: 64)")
    parser.add_argument("--probe-images", type=int, default=1000, help="scenes the probes see (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(arguments)
    model = fastigpt.load(options.model, backend=options.backend)
    figures = evaluate(model, n=options.n, n_probe=options.probe_images, seed=options.seed)
    print(json.dumps(figures, indent=2) if options.json else table(figures))


if __name__ == "__main__":
    main()
