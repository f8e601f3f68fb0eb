"""Endless seeded scenes for a small text-to-image model: the drawn world that the bundled model learned.

A scene is a handful of facts: sky, ground, one or two subjects with a colour, a size and a place (world.py). paint.py
draws it, captions.py says it in words, describe.py reads it back from the pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fastigpt.scenes.captions import caption
from fastigpt.scenes.paint import paint
from fastigpt.scenes.world import Scene, random_scene


def scenes(seed: int, first: int = 0, side: int = 32) -> Iterator[tuple[np.ndarray, str, Scene]]:
    """Endless (image uint8 [side, side, 3], caption, scene). Item k depends on (seed, first + k) and the side, a
    multiple of 32; the scene and its caption do not depend on that."""
    index = first
    while True:
        scene, rng = scene_at(seed, index)
        yield paint(scene, side), caption(scene, rng), scene
        index += 1


def scene_at(seed: int, index: int) -> tuple[Scene, np.random.Generator]:
    """That item's scene, not yet painted, and the chances that its caption takes."""
    rng = np.random.default_rng([seed, index])
    return random_scene(rng), rng
