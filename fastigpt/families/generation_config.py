"""Drawing options that a checkpoint recommends: those of its family, or what a generation_config.json says instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastigpt.errors import CheckpointError
from fastigpt.sampling import checked_drawing
from fastigpt.untrusted import exists, read_json

GENERATION = "generation_config.json"
NAMES = ("guidance_scale", "temperature", "top_k", "top_p")
"""What is read, as transformers names it. null: none, whatever the family's is."""


def read(path: Path, family: Mapping[str, Any]) -> dict[str, Any]:
    """The options by name, without those that are off. family: its own. Raises CheckpointError naming the file."""
    data = read_json(path) if exists(path) else {}
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(data).__name__}")
    found = {name: data.get(name, family.get(name)) for name in NAMES}
    if found["top_k"] == 0:  # how transformers turns it off
        found["top_k"] = None
    told = {name: value for name, value in found.items() if value is not None}
    try:
        drawing = checked_drawing(0, **told)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return {name: getattr(drawing, name) for name in told}


def write(path: Path, options: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({name: options.get(name) for name in NAMES}, indent=2) + "\n")
