"""The checkpoint that comes with the package: a small model of drawn scenes. It is used when no model is named, and
never stands in for one that was."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from fastigpt.codecs.palette import Palette
from fastigpt.families.image_gpt.checkpoint import read_palette
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.families.pretrained import CONFIG

BUNDLED = Path(__file__).parent / "data" / "scenes"


@lru_cache(maxsize=1)
def bundled_palette() -> Palette:
    config = ImageGPTConfig.from_json((BUNDLED / CONFIG).read_bytes(), source=CONFIG)
    palette = read_palette(BUNDLED, config)
    assert palette is not None
    return palette
