"""The sentences a scene can be said in.

    [a|an] [small|big] [color] kind                                  a subject; size and colour may be left out
    subject [on the left | in the middle | on the right]             one subject
    subject (left of | right of | above) subject                     two
    ... [on|over ground] [by day | at sunset | at night | in the rain]

"a red house on snow at night", "a small blue car left of an orange tree on grass by day". Captions leave facts out at
random, so that a model also learns to choose what a prompt does not say.
"""

from __future__ import annotations

import numpy as np

from fastigpt.scenes.world import COLORS, FLYING, GROUNDS, KINDS, RELATIONS, SIDES, SIZES, SKIES, Scene, Subject

SKY_WORDS = {"day": "by day", "sunset": "at sunset", "night": "at night", "rain": "in the rain"}
SIDE_WORDS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
RELATION_WORDS = {"left": "left of", "right": "right of", "above": "above"}
PROMPT_LENGTH = 16
WORDS = (
    "<pad>",
    *("a", "an", "on", "over", "of", "the", "in", "by", "at", "above"),
    *SIZES,
    *COLORS,
    *KINDS,
    *SIDES,
    *GROUNDS,
    *SKIES,
)
EXAMPLES = (
    "a red house on snow at night",
    "a blue house on grass by day",
    "a small white cat on the left on sand at sunset",
    "a yellow balloon above a green tree on grass by day",
    "a purple boat on water in the rain",
    "an orange rocket right of a pink mountain on snow at night",
)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A sentence for the scene: all its facts or, with rng, a random part of them (always the kinds)."""

    def said(probability: float) -> bool:
        return rng is None or rng.random() < probability

    def name(subject: Subject) -> str:
        words = [subject.size] if said(0.4) else []
        words += [subject.color] if said(0.9) else []
        words.append(subject.kind)
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])

    parts = [name(scene.subjects[0])]
    if scene.relation is not None:
        parts += [RELATION_WORDS[scene.relation], name(scene.subjects[1])]
    elif said(0.5):
        parts.append(SIDE_WORDS[scene.subjects[0].side])
    if said(0.9):
        parts.append(f"{'over' if scene.subjects[-1].kind in FLYING else 'on'} {scene.ground}")
    if said(0.9):
        parts.append(SKY_WORDS[scene.sky])
    return " ".join(parts)


def parse(text: str) -> dict[str, str]:
    """The facts that a sentence of the grammar states, named as in `Scene.facts`. Raises ValueError for others."""
    words = text.lower().replace(",", " ").split()
    facts: dict[str, str] = {}

    def take(phrases: dict[str, str]) -> str | None:
        for key, phrase in phrases.items():
            n = len(phrase.split())
            if words[:n] == phrase.split():
                del words[:n]
                return key
        return None

    def fact(name: str, phrases: dict[str, str]) -> bool:
        found = take(phrases)
        if found is not None:
            facts[name] = found
        return found is not None

    def subject(suffix: str) -> None:
        article = take({"a": "a", "an": "an"})
        fact("size" + suffix, {s: s for s in SIZES})
        fact("color" + suffix, {c: c for c in COLORS})
        if article is None or not fact("kind" + suffix, {k: k for k in KINDS}):
            raise ValueError(f"expected a subject at {' '.join(words)!r} in the caption {text!r}")

    subject("")
    if fact("relation", {r: RELATION_WORDS[r] for r in RELATIONS}):
        subject("2")
    else:
        fact("side", SIDE_WORDS)
    preposition = "over" if facts.get("kind2", facts["kind"]) in FLYING else "on"
    fact("ground", {g: f"{preposition} {g}" for g in GROUNDS})
    fact("sky", SKY_WORDS)
    if words:
        raise ValueError(f"cannot read {' '.join(words)!r} in the caption {text!r}")
    return facts
