"""The names of classes: ImageNet's 1,000, in the order in which models number them, with their synonyms in WordNet."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_NEAR = 4  # names that are told


@dataclass(frozen=True)
class ClassNames:
    """lines: of each class its names, the usual one first, with commas between them."""

    lines: tuple[str, ...]

    def number(self, name: str, argument: str = "label") -> int:
        """The class of a name, in any case, with hyphens, underscores or spaces. Where it is the usual name of one
        class and a synonym of others, it is that one. Raises ValueError that names `argument` and those near it, or
        all that the name may mean."""
        wanted = _plain(name)
        for found in (self._usual, self._any):
            numbers = found().get(wanted, [])
            if len(numbers) == 1:
                return numbers[0]
            if numbers:
                told = "; ".join(f"{number} is {self.lines[number]}" for number in numbers)
                raise ValueError(f"{argument} {_short(name)} names {len(numbers)} classes: {told}. Give a number")
        near = self._near(wanted)
        told = f" (near: {', '.join(near)})" if near else ""
        raise ValueError(
            f"{argument} {_short(name)} is no class: give a number, 0 to {len(self.lines) - 1}, or a name{told}"
        )

    def _usual(self) -> dict[str, list[int]]:
        return _numbers((i, line.split(",")[:1]) for i, line in enumerate(self.lines))

    def _any(self) -> dict[str, list[int]]:
        return _numbers((i, [*line.split(","), line]) for i, line in enumerate(self.lines))

    def _near(self, wanted: str) -> list[str]:
        names = [name.strip() for line in self.lines for name in line.split(",")]
        holding = [name for name in names if wanted and wanted in _plain(name).split()]
        plain = {_plain(name): name for name in names}
        close = [plain[name] for name in difflib.get_close_matches(wanted, plain, n=_NEAR, cutoff=0.7)]
        return list(dict.fromkeys([*close, *holding]))[:_NEAR]


def _numbers(named: Iterable[tuple[int, list[str]]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, names in named:
        for name in {_plain(name) for name in names}:
            found.setdefault(name, []).append(number)
    return found


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[-_]", " ", name.casefold()).split())


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else name[:57] + "...")


@cache
def imagenet() -> ClassNames:
    """Those of ILSVRC 2012."""
    text = (files("fastigpt") / "data" / "imagenet.txt").read_text(encoding="utf-8")
    return ClassNames(tuple(text.splitlines()))
