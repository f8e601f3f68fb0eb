"""What may be in a scene, and how one is thrown together: facts and their names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SKIES = ("day", "sunset", "night", "rain")
GROUNDS = ("grass", "sand", "snow", "water")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
KINDS = ("house", "tree", "boat", "car", "cat", "flower", "mountain", "person", "balloon", "rocket")
SIZES = ("small", "big")
SIDES = ("left", "middle", "right")
RELATIONS = ("left", "right", "above")

FLYING = ("balloon", "rocket")
# What may stand where; flying things may be over anything.
STANDING = {
    "grass": ("house", "tree", "car", "cat", "flower", "mountain", "person"),
    "sand": ("house", "tree", "car", "cat", "flower", "mountain", "person", "boat"),
    "snow": ("house", "tree", "car", "cat", "flower", "mountain", "person"),
    "water": ("boat", "mountain"),
}


@dataclass(frozen=True)
class Subject:
    """kind, color, size: from KINDS, COLORS, SIZES. x: centre as a fraction of the canvas width."""

    kind: str
    color: str
    size: str
    x: float

    @property
    def side(self) -> str:
        return SIDES[int(self.x > 0.4) + int(self.x > 0.6)]


@dataclass(frozen=True)
class Scene:
    """sky, ground: from SKIES, GROUNDS. relation: where the first of two subjects is as seen from the second, or None
    for a lone subject. style: seeds everything that no caption mentions (clouds, stars, shades, variants)."""

    sky: str
    ground: str
    subjects: tuple[Subject, ...]
    relation: str | None
    style: int

    def facts(self) -> dict[str, str]:
        """The facts that are scored, by name: sky, ground, kind, color, size, side; for two subjects kind2, color2,
        size2 and relation in place of side."""
        first = self.subjects[0]
        facts = {
            "sky": self.sky,
            "ground": self.ground,
            "kind": first.kind,
            "color": first.color,
            "size": first.size,
        }
        if self.relation is None:
            return facts | {"side": first.side}
        second = self.subjects[1]
        return facts | {
            "kind2": second.kind,
            "color2": second.color,
            "size2": second.size,
            "relation": self.relation,
        }


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene that the grammar can say, two in five with two subjects."""

    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    sky, ground = pick(SKIES), pick(GROUNDS)
    kinds = STANDING[ground] + FLYING
    style = int(rng.integers(2**31))
    if rng.random() < 0.6:
        side = pick(SIDES)
        x = {"left": 0.26, "middle": 0.5, "right": 0.74}[side] + rng.uniform(-0.06, 0.06)
        return Scene(sky, ground, (Subject(pick(kinds), pick(COLORS), pick(SIZES), x),), None, style)
    relation = pick(RELATIONS)
    if relation == "above":
        first, second = pick(FLYING), pick(STANDING[ground])
        x = rng.uniform(0.3, 0.7)
        xs = (x + rng.uniform(-0.06, 0.06), x)
        sizes = ("small", pick(SIZES))  # two big things do not fit one above the other
    else:
        first, second = pick(kinds), pick(kinds)
        xs = (0.25 + rng.uniform(-0.03, 0.03), 0.75 + rng.uniform(-0.03, 0.03))
        if relation == "right":
            xs = xs[::-1]
        sizes = (pick(SIZES), pick(SIZES))
    color = pick(COLORS)
    color2 = pick(tuple(c for c in COLORS if c != color))
    pair = (Subject(first, color, sizes[0], xs[0]), Subject(second, color2, sizes[1], xs[1]))
    return Scene(sky, ground, pair, relation, style)
