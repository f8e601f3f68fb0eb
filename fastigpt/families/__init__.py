"""Model families: published checkpoints, with their names and formats, to what engines know (fastigpt/spec.py).

A family is a package or module here that alone knows the file names, tensor names and config fields of its checkpoints.
Its `Family` reads a directory and hands over a `Pretrained`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastigpt.errors import CheckpointError
from fastigpt.untrusted import short

if TYPE_CHECKING:
    from fastigpt.families.pretrained import Family, FileFamily


def _image_gpt() -> Family:
    from fastigpt.families.image_gpt import checkpoint

    return checkpoint


def _llamagen() -> Any:
    from fastigpt.families import llamagen

    return llamagen


def _janus() -> Family:
    from fastigpt.families import janus

    return janus


FAMILIES: dict[str, Callable[[], Family]] = {
    "imagegpt": _image_gpt,
    "llamagen": _llamagen,
    "janus": _janus,
    "multi_modality": _janus,
}
"""By config.json's model_type; imported when it is asked for."""
FILES: dict[str, Callable[[], FileFamily]] = {".pt": _llamagen}
"""Of those that are published as single files, by how the name ends."""
_UNNAMED = "imagegpt"  # of a config.json without a model_type: those of old Image GPTs


def of(data: Any, source: str) -> Family:
    """The family of a checkpoint. data: its config.json; `source` names that in errors. Raises CheckpointError."""
    if not isinstance(data, dict):
        raise CheckpointError(f"{source} must hold a JSON object, not {type(data).__name__}")
    name = data.get("model_type", _UNNAMED)
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(f'"{name}"' for name in FAMILIES)
        raise CheckpointError(f"{source}: model_type is {short(name)}; the known ones are {known}")
    return FAMILIES[name]()


def wanted() -> list[str]:
    """Patterns of all file names that some family reads."""
    return sorted({pattern for family in FAMILIES.values() for pattern in family().WANTED})
