"""Exact, fast sampling from autoregressive image transformers."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any

if _TYPE_CHECKING:
    from fastigpt.api import complete, load, sample
    from fastigpt.codecs.palette import Palette
    from fastigpt.errors import CheckpointError
    from fastigpt.families.image_gpt.config import ImageGPTConfig
    from fastigpt.families.image_gpt.tensorflow import convert
    from fastigpt.images import grid
    from fastigpt.integrations.transformers import accelerate, restore
    from fastigpt.job import Stats
    from fastigpt.model import ImageGPT
    from fastigpt.nearest import NearestCentroid, nearest_centroid

    __version__: str

__all__ = [
    "CheckpointError",
    "ImageGPT",
    "ImageGPTConfig",
    "NearestCentroid",
    "Palette",
    "Stats",
    "accelerate",
    "complete",
    "convert",
    "grid",
    "load",
    "nearest_centroid",
    "restore",
    "sample",
]

# Where each name is defined: modules are imported when a name of theirs is first used, torch among them, so that the
# command line can show its help without waiting for them (PEP 562).
_HOME = {
    "CheckpointError": "errors",
    "ImageGPT": "model",
    "ImageGPTConfig": "families.image_gpt.config",
    "NearestCentroid": "nearest",
    "Palette": "codecs.palette",
    "Stats": "job",
    "accelerate": "integrations.transformers",
    "complete": "api",
    "convert": "families.image_gpt.tensorflow",
    "grid": "images",
    "load": "api",
    "nearest_centroid": "nearest",
    "restore": "integrations.transformers",
    "sample": "api",
}


def _find(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        found: Any = version("fastigpt")
    elif name in _HOME:
        found = getattr(_import_module(f"fastigpt.{_HOME[name]}"), name)
    else:
        found = _submodule(name)
    globals()[name] = found
    return found


if not _TYPE_CHECKING:  # a type checker should find the names above and no others
    __getattr__ = _find


def _submodule(name: str) -> Any:
    """fastigpt.model and the like are there without an import of their own."""
    module = f"fastigpt.{name}"
    try:
        if not name.startswith("_"):
            return _import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    raise AttributeError(f"module 'fastigpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
