"""What only pictures larger than 32 × 32 show: window bars, leaves, whiskers, waves, rays, stars with points.

Details hang on what they adorn and leave little to chance, so that a small model can learn them; their chances come
from brush.fine alone. None of them is a fact that captions tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastigpt.scenes.brush import Brush, Color

if TYPE_CHECKING:
    from fastigpt.scenes.subjects import SubjectPainter

# --- the sky and the land, in pixels of the 32 × 32 picture -------------------------------------------------------


def rays(brush: Brush, x: float, y: float) -> None:
    """Around the sun."""
    for k in range(12):
        dx, dy = math.cos(k * math.pi / 6), math.sin(k * math.pi / 6)
        brush.line([(x + 3.8 * dx, y + 3.8 * dy), (x + 4.9 * dx, y + 4.9 * dy)], 1, (255, 240, 160))


def birds(brush: Brush, horizon: float) -> None:
    assert brush.fine is not None
    for _ in range(int(brush.fine.integers(0, 3))):
        x, y = brush.fine.uniform(4, 28), brush.fine.uniform(8, horizon - 4)
        wings = [(x - 1, y - 0.5), (x - 0.5, y - 0.75), (x, y), (x + 0.5, y - 0.75), (x + 1, y - 0.5)]
        brush.line(wings, 1, (70, 84, 110))


def bands(brush: Brush, horizon: float) -> None:
    """Long thin clouds before an evening sky."""
    assert brush.fine is not None
    for y in (0.3 * horizon, 0.5 * horizon):
        x, w = brush.fine.uniform(4, 28), brush.fine.uniform(4, 7)
        brush.disc(x, y, w, (236, 128, 120), flat=0.07)
        brush.disc(x + 1.5, y + 0.5, 0.7 * w, (250, 168, 124), flat=0.07)


def star(brush: Brush, x: float, y: float) -> None:
    points = [(0, -0.8), (0.2, -0.2), (0.8, 0), (0.2, 0.2), (0, 0.8), (-0.2, 0.2), (-0.8, 0), (-0.2, -0.2)]
    brush.polygon([(x + dx, y + dy) for dx, dy in points], (252, 248, 214))


def craters(brush: Brush, x: float, y: float) -> None:
    for dx, dy, r in ((-1.3, -0.6, 0.6), (-0.9, 1.2, 0.75), (0.4, -1.5, 0.4), (0.9, 0.6, 0.55)):
        brush.disc(x + dx, y + dy, r, (232, 222, 176))


def patch(brush: Brush, ground: str, x: float, y: float, color: Color, dark: Color) -> None:
    """A tuft, a wave, a stone or a heap of snow at (x, y)."""
    if ground == "grass":
        for lean in (-0.9, 0.0, 0.9):
            brush.line([(x + 0.2 * lean, y), (x + lean, y - 1.5 + 0.3 * abs(lean))], 1.2, color)
    elif ground == "water":
        for dx, dy, length in ((0.0, 0.0, 3.2), (1.2, 0.9, 2.0)):
            crest = [
                (x + dx + t * length, y + dy - 0.28 * math.sin(t * 2 * math.pi)) for t in (k / 8 for k in range(9))
            ]
            brush.line(crest, 1.5, color)
    elif ground == "sand":
        brush.disc(x + 0.15, y + 0.15, 0.65, dark, flat=0.6)
        brush.disc(x, y, 0.6, color, flat=0.6)
        brush.line([(x + 1.5, y + 0.4), (x + 2.6, y + 0.2), (x + 3.8, y + 0.4)], 1, color)
    else:
        brush.disc(x, y + 0.2, 1.7, dark, flat=0.6)
        brush.disc(x, y, 1.6, color, flat=0.6)


# --- subjects, in their own coordinates (see subjects.py) -----------------------------------------------------------


def adorn(painter: SubjectPainter) -> None:
    """Over a subject that has been painted."""
    _DETAILS[painter.subject.kind](painter)


def _bars(p: SubjectPainter, x0: float, y0: float, x1: float, y1: float, frame: Color) -> None:
    """A window's frame and cross."""
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    for points in ([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], [(x, y0), (x, y1)], [(x0, y), (x1, y)]):
        p.stroke(points, 0.0, frame, thinnest=1.2)


def _house(p: SubjectPainter) -> None:
    for y in (0.12, 0.42):  # boards
        p.stroke([(-0.42, y), (-0.1, y)] if y < 0.34 else [(-0.42, y), (0.42, y)], 0.0, p.dark, thinnest=0.8)
    for k in range(1, 4):  # rows of tiles
        y = 0.52 + 0.12 * k
        half = 0.56 * (1.0 - y) / 0.48 - 0.03
        p.stroke([(-half, y), (half, y)], 0.0, p.line, thinnest=0.8)
    for x0, x1 in ((-0.34, -0.16), (0.22, 0.38)):
        _bars(p, x0, 0.2, x1, 0.4, (250, 248, 240))
    p.disc(0.09, 0.16, 0.022, 0.022, (250, 214, 90))
    p.box(-0.13, -0.02, 0.19, 0.02, (150, 146, 144))


def _tree(p: SubjectPainter) -> None:
    p.stroke([(-0.02, 0.03), (-0.02, 0.18)], 0.0, (78, 48, 30), thinnest=0.8)
    if p.fir:
        for y, half in ((0.28, 0.24), (0.5, 0.18), (0.7, 0.11)):
            for k in range(4):
                x = half * (2 * k / 3 - 1)
                p.stroke([(0.7 * x, y + 0.07), (x, y)], 0.0, p.dark, thinnest=1.0)
    else:
        for k, (x, y, r) in enumerate(((-0.17, 0.55, 0.12), (0.17, 0.55, 0.12), (0, 0.74, 0.17), (0, 0.6, 0.08))):
            for j in range(5):
                a = 2 * math.pi * (j + 0.5 * k) / 5
                p.disc(x + r * math.cos(a), y + r * math.sin(a), 0.026, 0.018, p.dark if (j + k) % 2 else p.pale)


def _boat(p: SubjectPainter) -> None:
    for y in (0.1, 0.2):
        half = 0.4 + 0.55 * y
        p.stroke([(-half + 0.06, y), (half, y)], 0.0, p.dark, thinnest=0.8)
    for y in (0.5, 0.66):
        p.stroke([(0.07, y), (0.06 + 0.42 * (0.98 - y) / 0.64 - 0.03, y)], 0.0, p.base, thinnest=0.8)
    p.polygon([(0.03, 1.0), (0.2, 0.96), (0.03, 0.92)], p.base)
    for x in (-0.24, 0.02, 0.28):
        p.disc(x, 0.22, 0.035, 0.035, (236, 240, 244))


def _car(p: SubjectPainter) -> None:
    p.stroke([(-0.02, 0.2), (-0.02, 0.58)], 0.0, p.line, thinnest=0.9)
    for x in (-0.16, 0.26):
        p.stroke([(x, 0.48), (x + 0.1, 0.48)], 0.0, p.line, thinnest=1.2)
    p.stroke([(-0.8, 0.56), (0.7, 0.54)], 0.0, p.pale, thinnest=1.0)
    for x in (-0.5, 0.52):
        for k in range(3):
            dx, dy = 0.1 * math.cos(k * math.pi / 3), 0.1 * math.sin(k * math.pi / 3)
            p.stroke([(x - dx, 0.18 - dy), (x + dx, 0.18 + dy)], 0.0, (96, 94, 104), thinnest=0.8)
    p.box(-0.96, 0.4, -0.89, 0.52, (226, 60, 50))


def _cat(p: SubjectPainter) -> None:
    for s in (-1, 1):
        p.disc(s * 0.14 - 0.02, 0.7, 0.025, 0.03, (250, 252, 250))
        for dy in (-0.03, 0.04):
            p.stroke([(s * 0.1, 0.55), (s * 0.4, 0.55 + dy)], 0.0, (250, 250, 250), thinnest=0.7)
        p.polygon([(s * 0.28, 0.76), (s * 0.27, 0.94), (s * 0.14, 0.84)], (244, 160, 168))
        p.disc(s * 0.12, 0.03, 0.09, 0.05, p.pale)
        p.stroke([(s * 0.27, 0.24), (s * 0.16, 0.27)], 0.0, p.dark, thinnest=1.2)
    for x in (-0.07, 0.0, 0.07):
        p.stroke([(x, 0.8), (x, 0.87)], 0.0, p.dark, thinnest=1.2)


def _flower(p: SubjectPainter) -> None:
    for x, y in ((-0.15, 0.2), (0.15, 0.28)):
        p.stroke([(x - 0.1, y), (x + 0.1, y)], 0.0, (24, 92, 36), thinnest=0.8)
    for k in range(6):
        dx, dy = math.cos(k * math.pi / 3 + 0.5), math.sin(k * math.pi / 3 + 0.5)
        p.stroke([(0.16 * dx, 0.7 + 0.16 * dy), (0.27 * dx, 0.7 + 0.27 * dy)], 0.0, p.dark, thinnest=1.0)
        p.disc(0.07 * dx, 0.7 + 0.07 * dy, 0.018, 0.018, (92, 58, 26))


def _mountain(p: SubjectPainter) -> None:
    for x, y in ((-0.5, 0.3), (-0.25, 0.52), (-0.2, 0.22), (0.35, 0.3)):
        p.stroke([(x - 0.06, y - 0.08), (x, y), (x + 0.05, y - 0.06)], 0.0, p.line, thinnest=0.9)
    for x in (-0.7, -0.58, 0.6):
        p.polygon([(x - 0.04, 0.02), (x + 0.04, 0.02), (x, 0.14)], (40, 92, 64))


def _person(p: SubjectPainter) -> None:
    for s in (-1, 1):
        p.disc(s * 0.045, 0.82, 0.016, 0.02, (40, 34, 36))
        p.disc(s * 0.3, 0.41, 0.045, 0.045, p.skin)
        p.box(s * 0.1 - 0.075, -0.01, s * 0.1 + 0.075, 0.045, (44, 36, 36))
    p.stroke([(-0.04, 0.755), (0, 0.74), (0.04, 0.755)], 0.0, (170, 70, 70), thinnest=0.9)
    p.stroke([(0, 0.34), (0, 0.66)], 0.0, p.line, thinnest=0.8)
    p.box(-0.19, 0.3, 0.19, 0.34, (70, 52, 44))


def _balloon(p: SubjectPainter) -> None:
    for half in (0.13, 0.25):
        for s in (-1, 1):
            seam = [
                (s * half * math.cos(a), 0.66 + 0.33 * math.sin(a)) for a in (k * math.pi / 8 for k in range(-4, 5))
            ]
            p.stroke(seam, 0.0, p.line, thinnest=0.8)
    for y in (0.05, 0.11):
        p.stroke([(-0.11, y), (0.11, y)], 0.0, (78, 48, 30), thinnest=0.8)
    p.box(-0.13, 0.16, 0.13, 0.2, (84, 52, 34))


def _rocket(p: SubjectPainter) -> None:
    p.disc(0, 0.6, 0.085, 0.085, (190, 230, 250), line=True)
    p.stroke([(-0.04, 0.62), (0.02, 0.66)], 0.0, (250, 252, 255), thinnest=1.0)
    for y in (0.3, 0.44, 0.76):
        half = 0.17 if y < 0.6 else 0.11
        p.stroke([(-half, y), (half, y)], 0.0, p.line, thinnest=0.8)
    p.polygon([(-0.075, 0.85), (0.075, 0.85), (0, 1.02)], p.dark)
    p.box(-0.02, 0.18, 0.02, 0.42, p.pale)


_DETAILS: dict[str, Callable[[SubjectPainter], None]] = {
    "house": _house,
    "tree": _tree,
    "boat": _boat,
    "car": _car,
    "cat": _cat,
    "flower": _flower,
    "mountain": _mountain,
    "person": _person,
    "balloon": _balloon,
    "rocket": _rocket,
}
