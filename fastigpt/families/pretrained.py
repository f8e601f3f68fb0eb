"""What a family hands over: a model as engines, codecs and prompts know it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from fastigpt.codecs import ImageCodec
from fastigpt.codecs.preprocessing import Preprocessing
from fastigpt.prompts import PromptReader
from fastigpt.save import CheckpointFiles
from fastigpt.spec import ModelSpec

CONFIG = "config.json"


class Pretrained(Protocol):
    """A model with its weights on the CPU or wherever they were given. It can be pickled.

    Its properties: config, the family's own description, for people and for the family; spec and `canonical()`, the
    weights under the names of spec.weight_shapes(), for engines; codec, None if the model cannot read and show images,
    and why in no_codec; reader, None if it reads no prompts; preprocessing, of images before the codec; no_head, why
    it cannot draw, in words that follow its name, or None if it can; defaults, drawing options where nothing is said
    (guidance_scale, top_k, top_p; see options.py).
    """

    @property
    def config(self) -> Any: ...
    @property
    def spec(self) -> ModelSpec: ...
    @property
    def codec(self) -> ImageCodec | None: ...
    @property
    def no_codec(self) -> str: ...
    @property
    def reader(self) -> PromptReader | None: ...
    @property
    def preprocessing(self) -> Preprocessing: ...
    @property
    def no_head(self) -> str | None: ...
    @property
    def defaults(self) -> Mapping[str, Any]: ...

    def canonical(self) -> Mapping[str, torch.Tensor]:
        """Possibly of tensors that are made when they are asked for: whoever takes them one after the other, and keeps
        none, needs memory for one."""
        ...

    def published(self) -> dict[str, str]:
        """The name that a published checkpoint has for each of canonical()'s tensors, for messages."""
        ...

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes a directory that `Family.read` reads back as the same. An older checkpoint in it is replaced as a
        whole."""
        ...


class Family(Protocol):
    """WANTED: patterns of the file names that are downloaded and read. BELONGS: names that a save writes or removes."""

    @property
    def WANTED(self) -> Sequence[str]: ...
    @property
    def BELONGS(self) -> frozenset[str]: ...

    def read(self, folder: Path, files: CheckpointFiles, data: Any) -> Pretrained:
        """Reads and checks a directory. data: its config.json, a dict. Raises CheckpointError naming the file."""
        ...


class FileFamily(Protocol):
    """One whose checkpoints are also published as single files."""

    def read_file(self, path: Path) -> Pretrained:
        """Reads and checks a file, and what belongs to it beside it. Raises CheckpointError naming the file."""
        ...
