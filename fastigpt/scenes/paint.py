"""Draws scenes: painted four times as large as they are shown and averaged down, so that edges are smooth.

The land, the sky and what falls from it are here; what stands in them is in subjects.py, and what only large pictures
show of either in details.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from fastigpt.scenes import details
from fastigpt.scenes.brush import OVERSAMPLING, SIDE, Brush, Color
from fastigpt.scenes.subjects import Light, SubjectPainter, height_of, lit, mix
from fastigpt.scenes.world import FLYING, Scene

# Colours of the sky from top to horizon, and what its light does to everything under it.
SKY: dict[str, tuple[Sequence[Color], Light]] = {
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


def paint(scene: Scene, side: int = SIDE) -> np.ndarray:
    """uint8 [side, side, 3]: the same picture every time for the same scene. side: a multiple of 32; a picture larger
    than 32 × 32 shows more (windows, leaves, waves), and averaged down it is nearly the small one."""
    if side < SIDE or side % SIDE:
        raise ValueError(f"side must be a multiple of {SIDE}, not {side!r}")
    rng = np.random.default_rng(scene.style)
    scale = OVERSAMPLING * side // SIDE
    horizon = float(rng.uniform(19.5, 21.5))
    image = Image.fromarray(np.repeat(_background(scene, horizon, scale, rng), SIDE * scale, axis=1))
    line = round(horizon * scale)
    land = image.crop((0, line, *image.size))
    brush = Brush(ImageDraw.Draw(image), scale, None if side == SIDE else np.random.default_rng([scene.style, 1]))
    _sky(brush, scene, horizon, rng)
    image.paste(land, (0, line))  # a low sun stands behind the horizon
    _ground(brush, scene, horizon, rng)
    light = SKY[scene.sky][1]
    feet = [_foot(scene, k, horizon, rng) for k in range(len(scene.subjects))]
    for k in np.argsort(feet, kind="stable"):
        _shadow(brush, scene, k, feet[k])
        painter = SubjectPainter(brush, scene.subjects[k], feet[k], light, scene.sky == "night", rng)
        painter.paint()
        if brush.fine is not None:
            details.adorn(painter)
    if scene.sky == "rain":
        _rain(brush, rng)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def _background(scene: Scene, horizon: float, scale: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [32 · scale, 1, 3]: sky and ground, each a gradient."""
    colors, light = SKY[scene.sky]
    shade = rng.uniform(0.94, 1.06)
    y = (np.arange(SIDE * scale) + 0.5) / scale
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
        return top + height_of(subject)
    if subject.kind == "mountain":
        return horizon + rng.uniform(1.0, 2.5)
    if scene.relation == "above":
        return horizon + rng.uniform(6.5, 9.5)
    return horizon + rng.uniform(4.0, 8.0) - (1.5 if subject.size == "small" else 0.0)


def _sky(brush: Brush, scene: Scene, horizon: float, rng: np.random.Generator) -> None:
    x = float(rng.choice([4.5, 27.5]) + rng.uniform(-1.5, 1.5))
    if scene.sky == "day":
        if brush.fine is not None:
            details.rays(brush, x, 4.5)
        brush.disc(x, 4.5, 3.4, (255, 236, 130))
        brush.disc(x, 4.5, 2.6, (255, 222, 60))
        for _ in range(rng.integers(0, 3)):
            _cloud(brush, rng.uniform(3, 29), rng.uniform(3, 9), (250, 252, 255), rng)
        if brush.fine is not None:
            details.birds(brush, horizon)
    elif scene.sky == "sunset":
        brush.disc(x, horizon - 1.0, 4.4, (255, 206, 120))
        brush.disc(x, horizon - 1.0, 3.2, (255, 240, 170))
        if brush.fine is not None:
            details.bands(brush, horizon)
    elif scene.sky == "night":
        for _ in range(rng.integers(5, 10)):
            column, row = int(rng.integers(0, SIDE)), int(rng.integers(0, int(horizon) - 3))
            if brush.fine is not None:
                details.star(brush, column + 0.5, row + 0.5)
                continue
            s = brush.scale
            box = (column * s, row * s, column * s + s - 1, row * s + s - 1)
            brush.draw.rectangle(box, fill=(232, 228, 190))
        brush.disc(x, 4.5, 3.0, (250, 244, 206))
        crescent = rng.random() < 0.6
        if brush.fine is not None:
            details.craters(brush, x, 4.5)
        if crescent:
            brush.disc(x + 1.4, 3.9, 2.5, (12, 14, 42))
    else:
        for left in range(-1, 34, 6):
            _cloud(brush, left + rng.uniform(-1, 1), rng.uniform(0.5, 2.0), (70, 76, 88), rng)


def _cloud(brush: Brush, x: float, y: float, color: Color, rng: np.random.Generator) -> None:
    r = rng.uniform(1.4, 2.0)
    puffs = ((-1.6, 0.35, 0.75), (0, 0, 1.0), (1.6, 0.35, 0.8))
    if brush.fine is not None:  # a darker belly
        for dx, dy, scale in puffs:
            brush.disc(x + dx * r, y + dy * r + 0.3, r * scale, mix(color, (90, 110, 140), 0.25), flat=0.8)
    for dx, dy, scale in puffs:
        brush.disc(x + dx * r, y + dy * r, r * scale, color, flat=0.8)


def _ground(brush: Brush, scene: Scene, horizon: float, rng: np.random.Generator) -> None:
    light = SKY[scene.sky][1]
    near, far = GROUND[scene.ground]
    accent = mix(near, (255, 255, 255), 0.35) if scene.ground in ("water", "snow") else mix(far, (0, 0, 0), 0.15)
    color = lit(accent, light)
    if scene.ground in ("grass", "sand", "snow") and rng.random() < 0.5:  # a hill behind
        x = rng.uniform(4, 28)
        brush.disc(x, horizon + 2.2, 13, lit(mix(near, far, 0.15), light), flat=0.3)
    for _ in range({"grass": 8, "sand": 5, "snow": 4, "water": 7}[scene.ground]):
        x, y = rng.uniform(0, SIDE), rng.uniform(horizon + 2, SIDE)
        if brush.fine is not None:
            details.patch(brush, scene.ground, x, y, color, lit(mix(far, (20, 30, 60), 0.22), light))
        elif scene.ground == "grass":
            brush.line([(x, y), (x, y - 1.3)], 3, color)
        elif scene.ground == "water":
            brush.line([(x, y), (x + 3, y)], 3, color)
        else:
            brush.disc(x, y, 0.6 if scene.ground == "sand" else 1.6, color, flat=0.6)


def _rain(brush: Brush, rng: np.random.Generator) -> None:
    for column in range(1, SIDE, 5):
        x, y = column + int(rng.integers(0, 3)), int(rng.integers(4, 26))
        brush.line([(x + 0.5, y), (x - 0.5, y + 3)], 2, (190, 206, 224))


def _shadow(brush: Brush, scene: Scene, k: int, foot: float) -> None:
    subject = scene.subjects[k]
    if subject.kind in FLYING or subject.kind == "mountain":
        return
    width = {"car": 1.0, "boat": 0.55, "house": 0.55}.get(subject.kind, 0.34) * height_of(subject)
    near, far = GROUND[scene.ground]
    color = lit(mix(mix(near, far, 0.6), (20, 24, 50), 0.28), SKY[scene.sky][1])
    brush.disc(subject.x * SIDE, foot, width, color, flat=0.22)
