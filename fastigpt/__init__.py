"""Exact, fast sampling from autoregressive image transformers."""

from importlib.metadata import version as _version

from fastigpt.api import complete, load, sample
from fastigpt.config import ImageGPTConfig
from fastigpt.errors import CheckpointError
from fastigpt.integrations.transformers import accelerate, restore
from fastigpt.model import ImageGPT
from fastigpt.openai_checkpoint import convert
from fastigpt.palette import Palette
from fastigpt.quantize import nearest_centroid
from fastigpt.job import Stats

__version__ = _version("fastigpt")
__all__ = [
    "CheckpointError",
    "ImageGPT",
    "ImageGPTConfig",
    "Palette",
    "Stats",
    "accelerate",
    "complete",
    "convert",
    "load",
    "nearest_centroid",
    "restore",
    "sample",
]
