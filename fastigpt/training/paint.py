"""Draws scenes: 32 × 32 pixels, painted four times as large and averaged down, so that edges are smooth.

Shapes are in a subject's own coordinates: x to the right from its centre, y up from its foot, one unit = its height.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from fastigpt.training.scenes import FLYING, Scene, Subject

SIDE = 32
SCALE = 4
Color = tuple[int, int, int]

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
# Colours of the sky from top to horizon, and what its light does to everything under it.
SKY: dict[str, tuple[Sequence[Color], tuple[float, float, float]]] = {
    "day": (((84, 162, 236), (186, 224, 250)), (1.0, 1.0, 1.0)),
    "sunset": (((92, 62, 140), (226, 96, 92), (254, 196, 96)), (1.0, 0.86, 0.80)),
    "night": (((8, 10, 36), (30, 36, 88)), (0.60, 0.62, 0.78)),
    "rain": (((96, 104, 116), (152, 160, 168)), (0.84, 0.86, 0.88)),
}
GROUND: dict[str, tuple[Color, Color]] = {
    "grass": ((132, 196, 84), (96, 164, 62)),
    "sand": ((236, 210, 150), (218, 184, 118)),
    "snow": ((236, 242, 250), (206, 218, 236)),
    "water": ((64, 152, 204), (36, 104, 168)),
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


def paint(scene: Scene) -> np.ndarray:
    """uint8 [32, 32, 3]: the same picture every time for the same scene."""
    rng = np.random.default_rng(scene.style)
    horizon = float(rng.uniform(19.5, 21.5))
    image = Image.fromarray(np.repeat(_background(scene, horizon, rng), SIDE * SCALE, axis=1))
    line = round(horizon * SCALE)
    land = image.crop((0, line, *image.size))
    draw = ImageDraw.Draw(image)
    _sky(draw, scene, horizon, rng)
    image.paste(land, (0, line))  # a low sun stands behind the horizon
    _ground(draw, scene, horizon, rng)
    light = SKY[scene.sky][1]
    feet = [_foot(scene, k, horizon, rng) for k in range(len(scene.subjects))]
    for k in np.argsort(feet, kind="stable"):
        subject = scene.subjects[k]
        _Painter(draw, subject, feet[k], light, scene.sky == "night", rng).paint(scene)
    if scene.sky == "rain":
        _rain(draw, rng)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def _background(scene: Scene, horizon: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 [128, 1, 3]: sky and ground, each a gradient."""
    colors, light = SKY[scene.sky]
    shade = rng.uniform(0.94, 1.06)
    y = (np.arange(SIDE * SCALE) + 0.5) / SCALE
    stops = np.linspace(0, horizon, len(colors))
    sky = np.stack([np.interp(y, stops, [c[i] for c in colors]) for i in range(3)], 1) * shade
    near = np.array(GROUND[scene.ground], dtype=float) * light
    t = ((y - horizon) / (SIDE - horizon))[:, None].clip(0, 1)
    if scene.ground == "water" and scene.sky == "sunset":
        near[0] = 0.55 * near[0] + 0.45 * np.array((254, 170, 110))
    ground = near[0] * (1 - t) + near[1] * t
    return np.where(y[:, None] < horizon, sky, ground).clip(0, 255).astype(np.uint8)[:, None]


def _foot(scene: Scene, k: int, horizon: float, rng: np.random.Generator) -> float:
    """y of a subject's foot in pixels."""
    subject = scene.subjects[k]
    if subject.kind in FLYING:
        top = rng.uniform(0.8, 1.6) if scene.relation == "above" else rng.uniform(1.0, 5.0)
        return top + _height(subject)
    if subject.kind == "mountain":
        return horizon + rng.uniform(1.0, 2.5)
    if scene.relation == "above":
        return horizon + rng.uniform(6.5, 9.5)
    return horizon + rng.uniform(4.0, 8.0) - (1.5 if subject.size == "small" else 0.0)


def _height(subject: Subject) -> float:
    return HEIGHT[subject.kind] * (SMALL if subject.size == "small" else 1.0)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, color: Color, flat: float = 1.0) -> None:
    """A filled ellipse around (x, y), in pixels of the finished picture."""
    draw.ellipse([(x - r) * SCALE, (y - r * flat) * SCALE, (x + r) * SCALE, (y + r * flat) * SCALE], fill=color)


def _sky(draw: ImageDraw.ImageDraw, scene: Scene, horizon: float, rng: np.random.Generator) -> None:
    x = float(rng.choice([4.5, 27.5]) + rng.uniform(-1.5, 1.5))
    if scene.sky == "day":
        _disc(draw, x, 4.5, 3.4, (255, 236, 130))
        _disc(draw, x, 4.5, 2.6, (255, 222, 60))
        for _ in range(rng.integers(0, 3)):
            _cloud(draw, rng.uniform(3, 29), rng.uniform(3, 9), (250, 252, 255), rng)
    elif scene.sky == "sunset":
        _disc(draw, x, horizon - 1.0, 4.4, (255, 206, 120))
        _disc(draw, x, horizon - 1.0, 3.2, (255, 240, 170))
    elif scene.sky == "night":
        for _ in range(rng.integers(5, 10)):
            column, row = int(rng.integers(0, SIDE)), int(rng.integers(0, int(horizon) - 3))
            box = (column * SCALE, row * SCALE, column * SCALE + SCALE - 1, row * SCALE + SCALE - 1)
            draw.rectangle(box, fill=(232, 228, 190))
        _disc(draw, x, 4.5, 3.0, (250, 244, 206))
        if rng.random() < 0.6:
            _disc(draw, x + 1.4, 3.9, 2.5, (12, 14, 42))
    else:
        for left in range(-1, 34, 6):
            _cloud(draw, left + rng.uniform(-1, 1), rng.uniform(0.5, 2.0), (70, 76, 88), rng)


def _cloud(draw: ImageDraw.ImageDraw, x: float, y: float, color: Color, rng: np.random.Generator) -> None:
    r = rng.uniform(1.4, 2.0)
    for dx, dy, scale in ((-1.6, 0.35, 0.75), (0, 0, 1.0), (1.6, 0.35, 0.8)):
        _disc(draw, x + dx * r, y + dy * r, r * scale, color, flat=0.8)


def _ground(draw: ImageDraw.ImageDraw, scene: Scene, horizon: float, rng: np.random.Generator) -> None:
    light = SKY[scene.sky][1]
    near, far = GROUND[scene.ground]
    accent = _mix(near, (255, 255, 255), 0.35) if scene.ground in ("water", "snow") else _mix(far, (0, 0, 0), 0.15)
    color = _lit(accent, light)
    if scene.ground in ("grass", "sand", "snow") and rng.random() < 0.5:  # a hill behind
        x = rng.uniform(4, 28)
        _disc(draw, x, horizon + 2.2, 13, _lit(_mix(near, far, 0.15), light), flat=0.3)
    for _ in range({"grass": 8, "sand": 5, "snow": 4, "water": 7}[scene.ground]):
        x, y = rng.uniform(0, SIDE), rng.uniform(horizon + 2, SIDE)
        if scene.ground == "grass":
            draw.line([x * SCALE, y * SCALE, x * SCALE, (y - 1.3) * SCALE], fill=color, width=SCALE - 1)
        elif scene.ground == "water":
            draw.line([x * SCALE, y * SCALE, (x + 3) * SCALE, y * SCALE], fill=color, width=SCALE - 1)
        else:
            _disc(draw, x, y, 0.6 if scene.ground == "sand" else 1.6, color, flat=0.6)


def _rain(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    for column in range(1, SIDE, 5):
        x, y = column + int(rng.integers(0, 3)), int(rng.integers(4, 26))
        line = [(x + 0.5) * SCALE, y * SCALE, (x - 0.5) * SCALE, (y + 3) * SCALE]
        draw.line(line, fill=(190, 206, 224), width=2)


def _mix(a: Color, b: Color, t: float) -> Color:
    return tuple(round(p * (1 - t) + q * t) for p, q in zip(a, b))  # type: ignore[return-value]


def _lit(color: Color, light: tuple[float, float, float]) -> Color:
    return tuple(min(255, round(p * q)) for p, q in zip(color, light))  # type: ignore[return-value]


class _Painter:
    """Draws one subject."""

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        subject: Subject,
        foot: float,
        light: tuple[float, float, float],
        night: bool,
        rng: np.random.Generator,
    ) -> None:
        self.draw, self.subject, self.light, self.night, self.rng = draw, subject, light, night, rng
        self.x, self.y, self.unit = subject.x * SIDE * SCALE, foot * SCALE, _height(subject) * SCALE
        base = PAINT[subject.color]
        # Colours are what captions name: they stay nearer to themselves under coloured light than the land does.
        self.light = tuple(0.55 + 0.45 * v for v in light)  # type: ignore[assignment]
        if night:
            self.light = (0.74, 0.74, 0.84)
        shade = float(rng.uniform(0.95, 1.04))
        self.base = tuple(min(255, round(v * shade)) for v in base)
        self.dark = _mix(base, (20, 16, 30), 0.30)
        self.pale = _mix(base, (255, 255, 255), 0.30)
        self.line = _mix(base, (24, 18, 36), 0.62)

    def paint(self, scene: Scene) -> None:
        kind = self.subject.kind
        if kind not in FLYING and kind != "mountain":
            width = {"car": 1.0, "boat": 0.55, "house": 0.55}.get(kind, 0.34) * self.unit / SCALE
            near, far = GROUND[scene.ground]
            shadow = _lit(_mix(_mix(near, far, 0.6), (20, 24, 50), 0.28), SKY[scene.sky][1])
            _disc(self.draw, self.x / SCALE, self.y / SCALE, width, shadow, flat=0.22)
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
        shapes[kind]()

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.x + x * self.unit, self.y - y * self.unit

    def polygon(self, points: Sequence[tuple[float, float]], color: Sequence[int], *, glow: bool = False) -> None:
        corners = [self.at(*p) for p in points]
        self.draw.polygon(corners, fill=self.color(color, glow))

    def outlined(self, points: Sequence[tuple[float, float]], color: Sequence[int]) -> None:
        corners = [self.at(*p) for p in points]
        self.draw.polygon(corners, fill=self.color(color), outline=self.color(self.line), width=2)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Sequence[int], *, glow: bool = False) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color, glow=glow)

    def disc(
        self, x: float, y: float, rx: float, ry: float, color: Sequence[int], *, line: bool = False, glow: bool = False
    ) -> None:
        (x0, y0), (x1, y1) = self.at(x - rx, y + ry), self.at(x + rx, y - ry)
        outline = self.color(self.line) if line else None
        self.draw.ellipse([x0, y0, x1, y1], fill=self.color(color, glow), outline=outline, width=2)

    def stroke(self, points: Sequence[tuple[float, float]], width: float, color: Sequence[int]) -> None:
        self.draw.line(
            [self.at(*p) for p in points], fill=self.color(color), width=max(2, round(width * self.unit)), joint="curve"
        )

    def color(self, color: Sequence[int], glow: bool = False) -> Color:
        r, g, b = color
        return (r, g, b) if glow else _lit((r, g, b), self.light)

    def window(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.box(x0, y0, x1, y1, (255, 226, 110) if self.night else (206, 232, 250), glow=self.night)

    def house(self) -> None:
        roof = _mix(self.dark, (70, 44, 40), 0.55)
        self.box(0.2, 0.62, 0.32, 0.98, roof)
        self.outlined([(-0.44, 0), (0.44, 0), (0.44, 0.56), (-0.44, 0.56)], self.base)
        self.outlined([(-0.56, 0.52), (0.56, 0.52), (0, 1.0)], roof)
        self.box(-0.08, 0, 0.14, 0.34, _mix(BROWN, DARK, 0.35))
        self.window(-0.34, 0.2, -0.16, 0.4)
        self.window(0.22, 0.2, 0.38, 0.4)

    def tree(self) -> None:
        self.box(-0.07, 0, 0.07, 0.45, BROWN)
        if self.rng.random() < 0.5:
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
        skin = SKINS[self.rng.integers(len(SKINS))]
        hair = ((60, 40, 30), (30, 26, 30), (196, 140, 60))[self.rng.integers(3)]
        for s in (-1, 1):
            self.box(s * 0.09 - 0.065, 0, s * 0.09 + 0.065, 0.34, (58, 62, 92))
            self.stroke([(s * 0.16, 0.64), (s * 0.3, 0.42)], 0.11, self.dark)
        self.outlined([(-0.19, 0.3), (0.19, 0.3), (0.2, 0.68), (-0.2, 0.68)], self.base)
        self.disc(0, 0.84, 0.15, 0.15, hair)
        self.disc(0, 0.81, 0.125, 0.125, skin)

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
