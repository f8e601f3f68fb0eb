"""Reads and writes checkpoints in the Hugging Face layout: config.json, the tensors, the palette, the prompt's words.

A checkpoint is untrusted input. Every file is checked against what config.json promises before a model is built from
it, pickles are only read with weights_only=True, and whatever is wrong ends in a CheckpointError that names the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastigpt import processor, save
from fastigpt.codecs.palette import Palette
from fastigpt.config import ImageGPTConfig
from fastigpt.errors import CheckpointError
from fastigpt.families.tensor_names import HEAD, canonical_names, check_tensors
from fastigpt.processor import Preprocessing, Processor
from fastigpt.prompts import Vocabulary
from fastigpt.save import CheckpointFiles, Stamp
from fastigpt.tensor_files import SAFETENSORS, in_memory, open_weights
from fastigpt.untrusted import exists, read_json, short, shown

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
PROMPT = "prompt.json"
PALETTE_ARRAYS = ("clusters.npy", "kmeans_centers.npy")
CAUSAL = "ImageGPTForCausalImageModeling"
_WANTED = [CONFIG, PROCESSOR, PROMPT, *PALETTE_ARRAYS, "model*.safetensors*", "pytorch_model*.bin*"]
_WRITTEN = frozenset({CONFIG, SAFETENSORS, PROCESSOR, PROMPT})
_ATTEMPTS = 3  # at reading a directory that somebody is writing to


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds. weights: CPU tensors as stored, biases that are all zero left out; without
    lm_head.weight if the architecture has no head for colours. palette: None if the directory has none. vocabulary:
    None if the model reads no prompt. architecture: as config.json names it."""

    config: ImageGPTConfig
    weights: dict[str, torch.Tensor]
    palette: Palette | None
    vocabulary: Vocabulary | None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    architecture: str = CAUSAL


def locate(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """The directory of a checkpoint: a local one, or a hub id downloaded into huggingface_hub's cache.

    Raises CheckpointError if there is neither such a directory nor such a model, or if the hub can't be reached;
    TypeError for anything but a str or a path.
    """
    text = _text(name_or_path)
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            return path
        found = exists(path)
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero byte, the home of nobody
        raise CheckpointError(f"no directory {short(text, 400)}: {error}") from None
    if found:
        raise CheckpointError(_advice(path))
    looks_local = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or not text
    if looks_local:
        raise CheckpointError(f"no directory {short(text, 400)}")
    # Imported here: only who downloads should wait for it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(text, revision=revision, local_files_only=local_files_only, allow_patterns=_WANTED)
    except HFValidationError as error:
        raise CheckpointError(f"{short(text, 400)} is neither a directory nor a model id: {error}") from None
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        where = "in the local cache" if local_files_only else "as a directory, in the local cache or on the hub"
        raise CheckpointError(f"{text!r} was not found {where}: {error}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{text!r} is no directory, and the hub did not give it: {error}") from None
    return Path(folder)


def _text(name_or_path: str | os.PathLike[str]) -> str:
    text = os.fspath(name_or_path) if isinstance(name_or_path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"name_or_path must be a directory or a hub id, a str or a path, not {short(name_or_path)}")
    return text


def _advice(path: Path) -> str:
    """What to load instead of a file."""
    start = f"{shown(path)} is a file; a checkpoint is a directory with {CONFIG}"
    if not path.is_file():
        return f"{shown(path)} is no directory; a checkpoint is one with {CONFIG}"
    if path.suffix == ".npy":
        return f"{start}. Palettes are read with fastigpt.Palette.from_file"
    if ".ckpt" in path.name:
        return f"{start}. TensorFlow's checkpoints are converted with `fastigpt convert`"
    if exists(path.parent / CONFIG):
        return f"{start}: load {str(path.parent)!r}"
    return start


def stamp(name_or_path: str | os.PathLike[str]) -> Stamp | None:
    """Differs when the files of a local checkpoint have changed; None where there is no such directory."""
    try:
        folder = Path(_text(name_or_path)).expanduser()
        return CheckpointFiles(folder, _WRITTEN).stamp(_WANTED) if folder.is_dir() else None
    except (OSError, ValueError, RuntimeError):
        return None


def read(folder: Path) -> Checkpoint:
    """Reads and checks a checkpoint directory. Raises CheckpointError naming the file that is missing or wrong."""
    for _ in range(_ATTEMPTS):
        before = stamp(folder)
        failed = None
        try:
            found = _read(folder, CheckpointFiles(folder, _WRITTEN.union(PALETTE_ARRAYS)))
        except CheckpointError as error:
            failed = error
        if stamp(folder) == before:
            if failed is not None:
                raise failed
            return found
    raise CheckpointError(f"{folder} is being written to; it changed while it was read")


def _read(folder: Path, files: CheckpointFiles) -> Checkpoint:
    config_file = files.path(CONFIG)
    if not exists(config_file):
        raise CheckpointError(f"{config_file} is missing (found in {folder}: {_listing(folder)})")
    data = read_json(config_file)
    pictures = _read_processor(files.path(PROCESSOR))
    config = ImageGPTConfig.from_dict(data, source=str(config_file), size=pictures.size if pictures else None)
    architecture = _architecture(data, str(config_file))
    source, stored = open_weights(folder, files.path)
    weights = check_tensors(
        config,
        canonical_names(stored, str(source)),
        source=str(source),
        n_positions=data["n_positions"],
        headless=architecture != CAUSAL,
        own=True,
    )
    palette = _palette(files, pictures, config)
    preprocessing = Preprocessing()
    if pictures is not None and palette is not None:
        preprocessing = pictures.preprocessing_for(config.height, config.width, str(files.path(PROCESSOR)))
    vocabulary = _read_vocabulary(files.path(PROMPT), config)
    return Checkpoint(
        config, weights, palette, vocabulary, preprocessing, architecture if HEAD not in weights else CAUSAL
    )


def _listing(folder: Path) -> str:
    try:
        return ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    except OSError as error:
        return str(error.strerror)


def _architecture(data: Any, source: str) -> str:
    names = data.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{source}: architectures must be a list of names, not {short(names)}")
    return CAUSAL if CAUSAL in names else short(names[0])[1:-1] if names else "of no named architecture"


def check_weights(
    config: ImageGPTConfig, weights: Mapping[str, torch.Tensor], *, source: str
) -> dict[str, torch.Tensor]:
    """The tensors a model of this config uses. Raises CheckpointError for missing, misshapen or non-finite ones."""
    stored = in_memory(weights)
    return check_tensors(config, stored, source=source, n_positions=config.n_pixels, headless=False, own=False)


def write(
    folder: str | os.PathLike[str],
    config: ImageGPTConfig,
    weights: dict[str, torch.Tensor],
    palette: Palette | None,
    vocabulary: Vocabulary | None,
    preprocessing: Preprocessing | None = None,
    architecture: str = CAUSAL,
) -> None:
    """Writes a directory that transformers' ImageGPT classes open as well. An older checkpoint in it is replaced: a
    reader finds the old one or the new, whenever the writer dies, and files that are no checkpoint's stay."""
    pictures = preprocessing or Preprocessing()

    def fill(target: Path) -> None:
        _write_json(target / CONFIG, json.loads(config.to_json()) | {"architectures": [architecture]})
        save_file(_tensors_to_write(config, weights), target / SAFETENSORS, metadata={"format": "pt"})
        if palette is not None:
            _write_json(target / PROCESSOR, processor.config(palette, pictures, config.height, config.width))
        if vocabulary is not None:
            (target / PROMPT).write_text(vocabulary.to_json() + "\n")

    # A palette beside the weights is read if preprocessor_config.json has none, so it may not be another model's.
    save.replace(folder, fill, _WRITTEN if palette is not None else _WRITTEN.union(PALETTE_ARRAYS))


def _tensors_to_write(config: ImageGPTConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous, none sharing memory with another, and with all biases: transformers' class would start those it
    doesn't find at random."""
    dtype = weights["transformer.wte.weight"].dtype
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in weights.items():
        storage = tensor.untyped_storage()
        alone = storage.data_ptr() not in seen and storage.nbytes() == tensor.nbytes and tensor.is_contiguous()
        tensors[name] = tensor if alone else tensor.contiguous().clone()
        seen.add(storage.data_ptr())
    for name, shape in config.bias_shapes().items():
        if name not in tensors:
            tensors[name] = torch.zeros(shape, dtype=dtype, device="cpu")
    return tensors


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _read_processor(path: Path) -> Processor | None:
    if not exists(path):
        return None
    data = read_json(path)
    try:
        return processor.parse(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_palette(folder: Path, config: ImageGPTConfig) -> Palette | None:
    """The palette of a checkpoint directory, None if it has none."""
    files = CheckpointFiles(folder, _WRITTEN.union(PALETTE_ARRAYS))
    return _palette(files, _read_processor(files.path(PROCESSOR)), config)


def _palette(files: CheckpointFiles, pictures: Processor | None, config: ImageGPTConfig) -> Palette | None:
    if pictures is not None and pictures.clusters is not None:
        path = files.path(PROCESSOR)
        try:
            palette = pictures.palette()
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        assert palette is not None
        return _matching(palette, config, str(path))
    for path in map(files.path, PALETTE_ARRAYS):
        if exists(path):
            return read_palette_array(path, config, value_range=None if pictures is None else pictures.value_range)
    return None


def read_palette_array(path: Path, config: ImageGPTConfig, *, value_range: Any = None) -> Palette:
    """A palette from a .npy file, as OpenAI published it (kmeans_centers.npy)."""
    return _matching(Palette.from_file(path, value_range=value_range), config, str(path))


def _matching(palette: Palette, config: ImageGPTConfig, source: str) -> Palette:
    if palette.n_colors != config.n_colors:
        raise CheckpointError(f"{source} has {palette.n_colors} colours, the model has {config.n_colors}")
    return palette


def _read_vocabulary(path: Path, config: ImageGPTConfig) -> Vocabulary | None:
    if not config.n_words:
        return None
    if not exists(path):
        raise CheckpointError(f"{path} is missing: the model reads prompts of {config.n_words} words")
    data = read_json(path)
    try:
        vocabulary = Vocabulary.from_dict(data)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if (vocabulary.n_words, vocabulary.max_words) != (config.n_words, config.prompt_length):
        raise CheckpointError(
            f"{path} has {vocabulary.n_words} words in prompts of up to {vocabulary.max_words}, "
            f"the model {config.n_words} and {config.prompt_length}"
        )
    return vocabulary
