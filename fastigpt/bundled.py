"""The checkpoints that come with the package, small models of drawn scenes: the one that is used when no model is
named, and those that are asked for by name. None stands in for another that was named."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from fastigpt.codecs.palette import Palette
from fastigpt.families.image_gpt.checkpoint import read_palette
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.families.pretrained import CONFIG

_DATA = Path(__file__).parent / "data"
BUNDLED = _DATA / "scenes"
NAMED = {"scenes-128": _DATA / "scenes-128"}
"""By the name that `checkpoint.locate` knows, where no directory has it."""


@lru_cache(maxsize=1)
def bundled_palette() -> Palette:
    config = ImageGPTConfig.from_json((BUNDLED / CONFIG).read_bytes(), source=CONFIG)
    palette = read_palette(BUNDLED, config)
    assert palette is not None
    return palette
