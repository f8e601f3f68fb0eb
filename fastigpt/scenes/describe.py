"""Reads a scene's facts back from its pixels, to score whether a drawn image shows what its prompt asked for.

A small convolutional network that has only ever seen pictures and their facts: it shares no code with the painter. Its
weights are in fastigpt/data/reader.safetensors; `fit_reader` is how they were made.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from fastigpt.codecs.palette import Palette
from fastigpt.files import replacing
from fastigpt.scenes import scenes
from fastigpt.scenes.world import COLORS, GROUNDS, KINDS, SIDES, SIZES, SKIES

# What the network answers. "relation" decides what applies: "side" to a lone subject, the *2 to the second of two.
ANSWERS: dict[str, tuple[str, ...]] = {
    "sky": SKIES,
    "ground": GROUNDS,
    "relation": ("alone", "left", "above"),
    "side": SIDES,
    "kind": KINDS,
    "color": COLORS,
    "size": SIZES,
    "kind2": KINDS,
    "color2": COLORS,
    "size2": SIZES,
}


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(3, 16, 5, 2, 2), nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 48, 3, 2, 1)]
        )
        self.hidden = nn.Linear(48 * 16, 96)
        self.heads = nn.ModuleDict({name: nn.Linear(96, len(values)) for name, values in ANSWERS.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """images: float32 [B, 3, 32, 32] in [−1, 1]. Logits by name of the fact."""
        x = images
        for convolution in self.convolutions:
            x = F.gelu(convolution(x))
        x = F.gelu(self.hidden(x.flatten(1)))
        return {name: head(x) for name, head in self.heads.items()}


def canonical(facts: Mapping[str, str]) -> dict[str, str]:
    """The same facts with the left one of two subjects first: "A right of B" is "B left of A"."""
    if facts.get("relation") != "right":
        return dict(facts)
    swapped = {"kind": "kind2", "color": "color2", "size": "size2"}
    swapped |= {second: first for first, second in swapped.items()}
    return {swapped.get(name, name): value for name, value in facts.items()} | {"relation": "left"}


def describe(images: np.ndarray) -> list[dict[str, str]]:
    """The facts of images uint8 [n, 32, 32, 3], named as in `Scene.facts`, in canonical order."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise ValueError(f"images must be uint8 [n, 32, 32, 3], not {images.dtype} {list(images.shape)}")
    with torch.inference_mode():
        answers = {name: logits.argmax(1).tolist() for name, logits in _reader()(_as_input(images)).items()}
    described = []
    for k in range(len(images)):
        facts = {name: ANSWERS[name][chosen[k]] for name, chosen in answers.items()}
        mute = ("relation", "kind2", "color2", "size2") if facts["relation"] == "alone" else ("side",)
        described.append({name: value for name, value in facts.items() if name not in mute})
    return described


def confirmed(asked: Mapping[str, str], described: Mapping[str, str]) -> dict[str, bool]:
    """For each fact asked for, whether the description agrees."""
    return {name: described.get(name) == value for name, value in canonical(asked).items()}


def _as_input(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


@cache
def _reader() -> Reader:
    reader = Reader()
    weights = load_file(str(files("fastigpt.data") / "reader.safetensors"))
    reader.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return reader.eval()


def fit_reader(
    path: str | os.PathLike[str], palette: Palette, *, n: int = 60_000, epochs: int = 8, seed: int = 1
) -> None:
    """Trains the reader on n scenes and writes its weights (bfloat16 safetensors) to `path`.

    It sees them as roughly as a model may draw them: with noise, and with some pixels of other colours of the palette.
    """
    rng = np.random.default_rng(seed)
    drawn = list(itertools.islice(scenes(seed), n))
    images = np.stack([image for image, _, _ in drawn])
    facts = [canonical(scene.facts()) for _, _, scene in drawn]
    labels = {name: torch.tensor([_label(f, name) for f in facts]) for name in ANSWERS}
    torch.manual_seed(seed)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.01)
    batch = 128
    steps = epochs * (n // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        if step % (n // batch) == 0:
            order = rng.permutation(n)
        picked = order[step % (n // batch) * batch :][:batch]
        x = _as_input(_smudged(images[picked], palette, rng))
        answers = reader(x)
        losses = [F.cross_entropy(answers[name], labels[name][picked], ignore_index=-1) for name in ANSWERS]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    weights = {name: tensor.detach().to(torch.bfloat16) for name, tensor in reader.state_dict().items()}
    with replacing(Path(path)) as temporary:
        save_file(weights, temporary)


def _label(facts: Mapping[str, str], name: str) -> int:
    value = facts.get(name, "alone" if name == "relation" else None)
    return -1 if value is None else ANSWERS[name].index(value)


def _smudged(images: np.ndarray, palette: Palette, rng: np.random.Generator) -> np.ndarray:
    """Noise on every pixel, and one pixel in fifty of another colour of the palette."""
    noisy = images + rng.normal(0, 4, images.shape)
    off = rng.random(images.shape[:3]) < 0.02
    noisy[off] = palette.colors[rng.integers(palette.n_colors, size=int(off.sum()))]
    return noisy.clip(0, 255).astype(np.uint8)
