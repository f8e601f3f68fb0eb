"""What scenes are drawn with: shapes in pixels of a 32 × 32 picture, on a canvas that is larger and averaged down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import ImageDraw

SIDE = 32  # the pixels that all places and sizes are told in
OVERSAMPLING = 4  # every picture is painted so many times as large
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Brush:
    """draw: onto a canvas of SIDE · scale pixels squared. fine: chances for what only pictures larger than 32 × 32
    show, None for those; they are apart from a scene's own, so that a scene looks the same at every size."""

    draw: ImageDraw.ImageDraw
    scale: int
    fine: np.random.Generator | None

    def width(self, quarters: float) -> int:
        """Of a line, in quarters of a pixel of the 32 × 32 picture."""
        return max(1, round(quarters * self.scale / OVERSAMPLING))

    def disc(self, x: float, y: float, r: float, color: Color, flat: float = 1.0) -> None:
        """A filled ellipse around (x, y)."""
        s = self.scale
        self.draw.ellipse([(x - r) * s, (y - r * flat) * s, (x + r) * s, (y + r * flat) * s], fill=color)

    def line(self, points: Sequence[tuple[float, float]], quarters: float, color: Color) -> None:
        places = [(x * self.scale, y * self.scale) for x, y in points]
        self.draw.line(places, fill=color, width=self.width(quarters), joint="curve" if len(places) > 2 else None)

    def polygon(self, points: Sequence[tuple[float, float]], color: Color) -> None:
        self.draw.polygon([(x * self.scale, y * self.scale) for x, y in points], fill=color)
