"""Small checkpoints of Image GPT on the disk, and how they are opened, changed and refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, random_weights

from fastigpt import CheckpointError, ImageGPT, ImageGPTConfig, Palette
from fastigpt.prompts import Vocabulary


def palette(n_colors: int) -> Palette:
    return Palette(np.random.default_rng(0).uniform(-1, 1, (n_colors, 3)).astype(np.float32))


def model(config: ImageGPTConfig = TINY, **kwargs) -> ImageGPT:
    vocabulary = Vocabulary(("<pad>", "a", "red", "house", "tree"), 3) if config.n_words else None
    weights = random_weights(config, biases=kwargs.pop("biases", False))
    return ImageGPT(config, weights, palette=palette(config.n_colors), vocabulary=vocabulary, backend="portable")


def load(folder: Path | str, **kwargs) -> ImageGPT:
    """In float32, where logits can be compared to the bit."""
    return ImageGPT.from_pretrained(folder, backend="portable", **kwargs)


def written(folder: Path) -> Path:
    model().save_pretrained(folder)
    return folder


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ImageGPT.from_pretrained(folder)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not named in: {caught.value}"


def rewrite(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))
