"""Draws the subjects of a scene: ten kinds of thing, each in eight colours and two sizes.

Shapes are in a subject's own coordinates: x to the right from its centre, y up from its foot, one unit = its height.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastigpt.scenes.brush import SIDE, Brush, Color
from fastigpt.scenes.world import Subject

Light = tuple[float, float, float]

PAINT: dict[str, Color] = {
    "red": (216, 40, 40),
    "orange": (244, 132, 20),
    "yellow": (250, 216, 48),
    "green": (34, 142, 62),
    "blue": (40, 84, 214),
    "purple": (136, 58, 184),
    "pink": (248, 138, 186),
    "white": (246, 246, 244),
}
# Height in pixels of the big version; the small one is SMALL times that.
HEIGHT = {
    "house": 14.5,
    "tree": 17.0,
    "boat": 15.5,
    "car": 8.5,
    "cat": 14.0,
    "flower": 15.0,
    "mountain": 14.0,
    "person": 16.0,
    "balloon": 15.5,
    "rocket": 16.0,
}
SMALL = 0.62
BROWN: Color = (112, 72, 44)
DARK: Color = (44, 40, 48)
SKINS: tuple[Color, ...] = ((250, 214, 180), (224, 172, 128), (150, 98, 66), (104, 66, 46))


def height_of(subject: Subject) -> float:
    return HEIGHT[subject.kind] * (SMALL if subject.size == "small" else 1.0)


def mix(a: Color, b: Color, t: float) -> Color:
    return tuple(round(p * (1 - t) + q * t) for p, q in zip(a, b))  # type: ignore[return-value]


def lit(color: Color, light: Light) -> Color:
    return tuple(min(255, round(p * q)) for p, q in zip(color, light))  # type: ignore[return-value]


class SubjectPainter:
    """Draws one subject."""

    def __init__(
        self,
        brush: Brush,
        subject: Subject,
        foot: float,
        light: Light,
        night: bool,
        rng: np.random.Generator,
    ) -> None:
        self.brush, self.subject, self.light, self.night, self.rng = brush, subject, light, night, rng
        self.draw, scale = brush.draw, brush.scale
        self.x, self.y, self.unit = subject.x * SIDE * scale, foot * scale, height_of(subject) * scale
        base = PAINT[subject.color]
        # Colours are what captions name: they stay nearer to themselves under coloured light than the land does.
        self.light = tuple(0.55 + 0.45 * v for v in light)  # type: ignore[assignment]
        if night:
            self.light = (0.74, 0.74, 0.84)
        shade = float(rng.uniform(0.95, 1.04))
        self.base = tuple(min(255, round(v * shade)) for v in base)
        self.dark = mix(base, (20, 16, 30), 0.30)
        self.pale = mix(base, (255, 255, 255), 0.30)
        self.line = mix(base, (24, 18, 36), 0.62)
        self.fir, self.skin = False, SKINS[0]  # of a tree and a person, by chance

    def paint(self) -> None:
        shapes: dict[str, Callable[[], None]] = {
            "house": self.house,
            "tree": self.tree,
            "boat": self.boat,
            "car": self.car,
            "cat": self.cat,
            "flower": self.flower,
            "mountain": self.mountain,
            "person": self.person,
            "balloon": self.balloon,
            "rocket": self.rocket,
        }
        shapes[self.subject.kind]()

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.x + x * self.unit, self.y - y * self.unit

    def polygon(self, points: Sequence[tuple[float, float]], color: Sequence[int], *, glow: bool = False) -> None:
        corners = [self.at(*p) for p in points]
        self.draw.polygon(corners, fill=self.color(color, glow))

    def outlined(self, points: Sequence[tuple[float, float]], color: Sequence[int]) -> None:
        corners = [self.at(*p) for p in points]
        self.draw.polygon(corners, fill=self.color(color), outline=self.color(self.line), width=self.brush.width(2))

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Sequence[int], *, glow: bool = False) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color, glow=glow)

    def disc(
        self, x: float, y: float, rx: float, ry: float, color: Sequence[int], *, line: bool = False, glow: bool = False
    ) -> None:
        (x0, y0), (x1, y1) = self.at(x - rx, y + ry), self.at(x + rx, y - ry)
        outline = self.color(self.line) if line else None
        self.draw.ellipse([x0, y0, x1, y1], fill=self.color(color, glow), outline=outline, width=self.brush.width(2))

    def stroke(
        self, points: Sequence[tuple[float, float]], width: float, color: Sequence[int], *, thinnest: float = 2
    ) -> None:
        """width: in heights of the subject; at least `thinnest`, see `Brush.width`."""
        line = max(self.brush.width(thinnest), round(width * self.unit))
        self.draw.line([self.at(*p) for p in points], fill=self.color(color), width=line, joint="curve")

    def color(self, color: Sequence[int], glow: bool = False) -> Color:
        r, g, b = color
        return (r, g, b) if glow else lit((r, g, b), self.light)

    def window(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.box(x0, y0, x1, y1, (255, 226, 110) if self.night else (206, 232, 250), glow=self.night)

    def house(self) -> None:
        roof = mix(self.dark, (70, 44, 40), 0.55)
        self.box(0.2, 0.62, 0.32, 0.98, roof)
        self.outlined([(-0.44, 0), (0.44, 0), (0.44, 0.56), (-0.44, 0.56)], self.base)
        self.outlined([(-0.56, 0.52), (0.56, 0.52), (0, 1.0)], roof)
        self.box(-0.08, 0, 0.14, 0.34, mix(BROWN, DARK, 0.35))
        self.window(-0.34, 0.2, -0.16, 0.4)
        self.window(0.22, 0.2, 0.38, 0.4)

    def tree(self) -> None:
        self.box(-0.07, 0, 0.07, 0.45, BROWN)
        self.fir = self.rng.random() < 0.5
        if self.fir:
            for y0, y1, r in ((0.2, 0.62, 0.36), (0.42, 0.82, 0.29), (0.62, 1.0, 0.2)):
                self.outlined([(-r, y0), (r, y0), (0, y1)], self.base)
        else:
            for x, y, r in ((-0.17, 0.55, 0.2), (0.17, 0.55, 0.2), (0, 0.74, 0.26)):
                self.disc(x, y, r, r, self.base, line=True)
            self.disc(0, 0.62, 0.22, 0.2, self.base)
            self.disc(-0.08, 0.8, 0.09, 0.08, self.pale)

    def boat(self) -> None:
        self.box(-0.03, 0.2, 0.03, 1.0, BROWN)
        self.outlined([(0.06, 0.34), (0.48, 0.34), (0.06, 0.98)], self.pale)
        self.outlined([(-0.06, 0.34), (-0.38, 0.34), (-0.06, 0.86)], (246, 244, 236))
        self.outlined([(-0.56, 0.3), (0.6, 0.3), (0.42, 0), (-0.38, 0)], self.base)

    def car(self) -> None:
        self.outlined([(-0.55, 0.5), (-0.36, 1.0), (0.3, 1.0), (0.58, 0.5)], self.dark)
        self.window(-0.38, 0.58, -0.06, 0.88)
        self.window(0.02, 0.58, 0.36, 0.88)
        self.outlined([(-0.95, 0.18), (0.95, 0.18), (0.95, 0.5), (0.8, 0.6), (-0.9, 0.62)], self.base)
        for x in (-0.5, 0.52):
            self.disc(x, 0.18, 0.24, 0.24, DARK)
            self.disc(x, 0.18, 0.1, 0.1, (190, 190, 196))
        self.box(0.84, 0.36, 0.97, 0.52, (255, 240, 150), glow=self.night)

    def cat(self) -> None:
        flip = 1 if self.rng.random() < 0.5 else -1
        self.stroke([(flip * 0.2, 0.1), (flip * 0.44, 0.16), (flip * 0.46, 0.42)], 0.11, self.dark)
        self.disc(0, 0.24, 0.28, 0.27, self.base, line=True)
        for s in (-1, 1):
            self.outlined([(s * 0.32, 0.7), (s * 0.3, 1.04), (s * 0.06, 0.86)], self.base)
        self.disc(0, 0.64, 0.34, 0.27, self.base, line=True)
        for s in (-1, 1):
            self.disc(s * 0.14, 0.67, 0.075, 0.085, (28, 40, 28))
        self.disc(0, 0.55, 0.05, 0.04, (240, 120, 130))
        self.disc(0, 0.2, 0.12, 0.14, self.pale)

    def flower(self) -> None:
        stem = (40, 128, 52)
        self.box(-0.045, 0, 0.045, 0.6, stem)
        self.disc(-0.15, 0.2, 0.14, 0.07, stem)
        self.disc(0.15, 0.28, 0.14, 0.07, stem)
        for k in range(6):
            x, y = 0.2 * np.cos(k * np.pi / 3 + 0.5), 0.2 * np.sin(k * np.pi / 3 + 0.5)
            self.disc(x, 0.7 + y, 0.145, 0.145, self.base, line=True)
        self.disc(0, 0.7, 0.14, 0.14, (122, 76, 34) if self.subject.color in ("yellow", "orange") else (252, 208, 60))

    def mountain(self) -> None:
        lean = float(self.rng.uniform(-0.12, 0.12))
        self.outlined([(-0.85, 0), (0.85, 0), (lean, 1.0)], self.base)
        self.polygon([(lean, 0.98), (0.8, 0.02), (lean + 0.1, 0.02), (lean - 0.06, 0.5)], self.dark)
        cap = (250, 252, 255) if self.subject.color != "white" else (200, 222, 250)
        edge = ((0.25, 0.7), (0.08, 0.76), (-0.06, 0.66), (-0.25, 0.7))
        self.polygon([(lean, 1.0), *((lean * 0.7 + x, y) for x, y in edge)], cap)

    def person(self) -> None:
        self.skin = SKINS[self.rng.integers(len(SKINS))]
        hair = ((60, 40, 30), (30, 26, 30), (196, 140, 60))[self.rng.integers(3)]
        for s in (-1, 1):
            self.box(s * 0.09 - 0.065, 0, s * 0.09 + 0.065, 0.34, (58, 62, 92))
            self.stroke([(s * 0.16, 0.64), (s * 0.3, 0.42)], 0.11, self.dark)
        self.outlined([(-0.19, 0.3), (0.19, 0.3), (0.2, 0.68), (-0.2, 0.68)], self.base)
        self.disc(0, 0.84, 0.15, 0.15, hair)
        self.disc(0, 0.81, 0.125, 0.125, self.skin)

    def balloon(self) -> None:
        for s in (-1, 1):
            self.stroke([(s * 0.22, 0.42), (s * 0.08, 0.16)], 0.03, BROWN)
        self.outlined([(-0.3, 0.52), (0.3, 0.52), (0.11, 0.28), (-0.11, 0.28)], self.base)
        self.disc(0, 0.66, 0.36, 0.34, self.base, line=True)
        self.disc(0, 0.66, 0.13, 0.33, self.pale)
        self.box(-0.11, 0, 0.11, 0.18, BROWN)

    def rocket(self) -> None:
        self.polygon([(-0.12, 0.2), (0.12, 0.2), (0, -0.08)], (255, 150, 40), glow=True)
        self.polygon([(-0.06, 0.2), (0.06, 0.2), (0, 0.04)], (255, 236, 120), glow=True)
        self.outlined([(-0.14, 0.48), (-0.32, 0.14), (0.32, 0.14), (0.14, 0.48)], self.dark)
        self.outlined([(-0.17, 0.2), (0.17, 0.2), (0.18, 0.6), (0, 1.02), (-0.18, 0.6)], self.base)
        self.disc(0, 0.6, 0.085, 0.085, (190, 230, 250))
