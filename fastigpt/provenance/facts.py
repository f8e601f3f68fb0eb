"""What a signed picture tells of how it was made, and how that is written into a C2PA manifest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
DRAWN = _SOURCE + "trainedAlgorithmicMedia"
DRAWN_IN_PART = _SOURCE + "compositeWithTrainedAlgorithmicMedia"
PARAMETER = "fastigpt."
"""What names of parameters of an action that are ours begin with."""


@dataclass(frozen=True)
class Facts:
    """model: its name. seed, index: of the noise contract, so that the picture can be drawn again. count: images in the
    picture, from `index` on; 1 unless it is a grid. parents: files of the photographs that were completed, as they were
    read; none: everything was drawn. The prompt is left out: it is the user's, and pictures travel."""

    model: str
    seed: int
    index: int
    count: int = 1
    parents: tuple[bytes, ...] = ()

    def manifest(self, version: str) -> dict[str, Any]:
        """The definition that c2pa's Builder takes; `component` ids are those of the ingredients that it is given if
        there are several parents. One parent is opened by the builder itself."""
        generator = {"name": "fastigpt", "version": version}
        # Numbers as text: readers in JavaScript would round them.
        parameters = {"model": self.model, "seed": str(self.seed), "index": str(self.index)}
        if self.count > 1:
            parameters["count"] = str(self.count)
        action: dict[str, Any] = {
            "action": "c2pa.edited" if len(self.parents) == 1 else "c2pa.created",
            "digitalSourceType": DRAWN_IN_PART if self.parents else DRAWN,
            "softwareAgent": generator,
            "parameters": {PARAMETER + name: value for name, value in parameters.items()},
        }
        actions: list[dict[str, Any]] = [action]
        if len(self.parents) > 1:
            names = map(component, range(len(self.parents)))
            actions += [{"action": "c2pa.placed", "parameters": {"ingredientIds": [name]}} for name in names]
        return {
            "claim_generator_info": [generator],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}],
        }


def public_name(model: str) -> str:
    """What a picture tells of a model: of a directory its last name only, for where it lies is nobody's business."""
    return Path(model).resolve().name if os.path.isdir(model) else model


def component(i: int) -> str:
    """The id of parent i, where there are several."""
    return f"photograph-{i}"
