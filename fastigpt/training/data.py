"""What a model is trained on, as batches of tokens: scenes drawn as they are needed, or a folder of somebody's images.

Batch k depends on the seed and k alone, so a training run that was killed goes on with the batch it would have had.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from fastigpt.codecs.palette import Palette
from fastigpt.images import on_white, read_image
from fastigpt.prompts import Vocabulary
from fastigpt.scenes import scenes
from fastigpt.scenes.captions import EXAMPLES, PROMPT_LENGTH, WORDS

HELD_OUT_SEED = 2**32 - 1  # scenes that no training run draws: seeds of runs are smaller
SCENES_PALETTE_SEED = 7
N_COLORS = 512


@dataclass(frozen=True)
class Batch:
    """tokens: int64 [B, n_pixels]. prompt: int64 [B, prompt_length], or None for images without captions."""

    tokens: torch.Tensor
    prompt: torch.Tensor | None


class Data(Protocol):
    """name: what a run is compared by when it goes on. palette: its colours are the tokens."""

    name: str
    palette: Palette

    @property
    def vocabulary(self) -> Vocabulary | None: ...

    def batch(self, step: int, size: int) -> Batch: ...

    def held_out(self, size: int) -> Batch | None: ...


def scene_vocabulary() -> Vocabulary:
    return Vocabulary(WORDS, PROMPT_LENGTH, EXAMPLES)


class Scenes:
    """The scenes of fastigpt.scenes: never the same image twice."""

    def __init__(self, seed: int, palette: Palette | None = None, n_colors: int | None = None) -> None:
        if not 0 <= seed < HELD_OUT_SEED:
            raise ValueError(f"seed must be a whole number in [0, {HELD_OUT_SEED}), not {seed!r}")
        self.name = "scenes"
        self.seed = seed
        self.vocabulary = scene_vocabulary()
        if palette is not None and n_colors not in (None, palette.n_colors):
            raise ValueError(f"n_colors is {n_colors}, but the palette that is there has {palette.n_colors} colours")
        self.palette = scene_palette(n_colors or N_COLORS) if palette is None else palette

    def batch(self, step: int, size: int) -> Batch:
        return self._draw(self.seed, step * size, size)

    def held_out(self, size: int) -> Batch:
        return self._draw(HELD_OUT_SEED, 0, size)

    def _draw(self, seed: int, first: int, size: int) -> Batch:
        drawn = list(itertools.islice(scenes(seed, first), size))
        prompt = torch.tensor([self.vocabulary.encode(caption) for _, caption, _ in drawn])
        return Batch(_tokens(np.stack([image for image, _, _ in drawn]), self.palette), prompt)


class Folder:
    """Every image below a folder, cut square, resized to side × side; mirrored at random. One in twenty is held out.

    Files that are no readable image are reported through `warn`, skipped and counted in `n_skipped`. palette: None
    makes one of n_colors (None: 512), or of all colours there are if those are fewer, which `warn` then says. Raises
    ValueError if no image is left.
    """

    vocabulary: Vocabulary | None = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        side: int,
        *,
        n_colors: int | None,
        seed: int,
        warn: Callable[[str], None],
        palette: Palette | None = None,
    ) -> None:
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"images must be a folder, {str(folder)!r} is not one")
        endings = Image.registered_extensions()
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in endings and p.is_file())
        images, self.n_skipped = [], 0
        for file in files:
            try:
                images.append(_read_square(file, side))
            except ValueError as error:
                self.n_skipped += 1
                warn(f"skipped {file}: {error}")
        if not images:
            skipped = f"; {self.n_skipped} could not be read" if self.n_skipped else ""
            raise ValueError(f"no images in {str(folder)!r} ({len(files)} image files{skipped})")
        if self.n_skipped:
            warn(f"skipped {self.n_skipped} of {len(files)} files")
        self.seed, self.side = seed, side
        self.name = f"{len(images)} images from {folder.resolve()}"
        order = np.random.default_rng(seed).permutation(len(images))
        pixels = np.stack(images)[order]
        if palette is None:
            palette = _palette_of(pixels, N_COLORS if n_colors is None else n_colors, seed, warn)
        elif n_colors not in (None, palette.n_colors) and palette.n_colors != min(n_colors, _n_distinct(pixels)):
            raise ValueError(f"n_colors is {n_colors}, but the palette that is there has {palette.n_colors} colours")
        self.palette = palette
        tokens = _tokens(pixels, self.palette)
        n_held = len(images) // 20
        self._held_out, self._tokens = tokens[:n_held], tokens[n_held:]

    def batch(self, step: int, size: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        picked = self._tokens[torch.from_numpy(rng.integers(len(self._tokens), size=size))]
        mirrored = picked.view(size, self.side, self.side).flip(2).flatten(1)
        return Batch(torch.where(torch.from_numpy(rng.random((size, 1)) < 0.5), mirrored, picked), None)

    def held_out(self, size: int) -> Batch | None:
        return Batch(self._held_out[:size], None) if len(self._held_out) else None


def _read_square(file: Path, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: the middle of an image file, read as everything else reads it."""
    image = on_white(read_image(file))
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    box = (left, top, left + edge, top + edge)
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=box))


def _tokens(pixels: np.ndarray, palette: Palette) -> torch.Tensor:
    """int64 [n, H·W] of images uint8 [n, H, W, 3]."""
    return torch.from_numpy(palette.encode(pixels)).view(len(pixels), -1)


def _palette_of(pixels: np.ndarray, n_colors: int, seed: int, warn: Callable[[str], None]) -> Palette:
    """At most n_colors for images uint8 [n, H, W, 3], dark ones first; none that the images do not have."""
    n_distinct = _n_distinct(pixels)
    if n_distinct < n_colors:
        warn(f"the images have {n_distinct} different colours, so the palette has {n_distinct}, not {n_colors}")
    clusters = Palette.fit(pixels, min(n_colors, n_distinct), seed).clusters
    return Palette(clusters[_dark_first(clusters)], value_range=(-1, 1))


def _n_distinct(pixels: np.ndarray) -> int:
    wide = pixels.astype(np.uint32)
    return len(np.unique(wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]))


def _dark_first(clusters: np.ndarray) -> np.ndarray:
    return np.argsort(clusters @ np.array([0.299, 0.587, 0.114], np.float32), kind="stable")


def fit_palette(pixels: np.ndarray, n_colors: int, seed: int) -> Palette:
    """The k-means centres of these pixels (uint8, last axis 3), dark ones first."""
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(seed)
    every = pixels.reshape(-1, 3)
    points = every[rng.permutation(len(every))[:120_000]].astype(np.float32) / 127.5 - 1
    distinct = np.unique(points, axis=0)
    if len(distinct) <= n_colors:  # every colour is a centre; the rows left over are colours the images do not use
        spare = rng.uniform(-1, 1, (n_colors - len(distinct), 3)).astype(np.float32)
        centres = np.concatenate([distinct, spare])
    else:
        centres = KMeans(n_colors, n_init=1, max_iter=60, random_state=seed).fit(points).cluster_centers_
    centres = centres.clip(-1, 1).astype(np.float32)
    return Palette(centres[_dark_first(centres)], value_range=(-1, 1))


def scene_palette(n_colors: int = N_COLORS) -> Palette:
    """k-means over scenes and, one point in four, a cloud around the grey axis, where photographs are."""
    rng = np.random.default_rng(SCENES_PALETTE_SEED)
    every = np.stack([image for image, _, _ in itertools.islice(scenes(SCENES_PALETTE_SEED), 1000)]).reshape(-1, 3)
    drawn = every[rng.permutation(len(every))[:90_000]]
    grey, spread = rng.uniform(0, 255, (30_000, 1)), rng.normal(0, 34, (30_000, 3))
    cloud = np.clip(grey + spread, 0, 255).astype(np.uint8)
    return fit_palette(np.concatenate([drawn, cloud]), n_colors, SCENES_PALETTE_SEED)
