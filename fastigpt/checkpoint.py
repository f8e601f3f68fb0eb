"""Reads and writes checkpoints in the Hugging Face layout: config.json, the tensors, the palette, the prompt's words.

A checkpoint is untrusted input. Every file is checked against what config.json promises before a model is built from
it, pickles are only read with weights_only=True, and whatever is wrong ends in a CheckpointError that names the file.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastigpt.config import ImageGPTConfig
from fastigpt.errors import CheckpointError
from fastigpt.files import write_folder
from fastigpt.palette import Palette
from fastigpt.prompts import Vocabulary

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
PROCESSOR = "preprocessor_config.json"
PROMPT = "prompt.json"
PALETTE_ARRAYS = ("clusters.npy", "kmeans_centers.npy")
_WANTED = [CONFIG, PROCESSOR, PROMPT, *PALETTE_ARRAYS, "model*.safetensors*", "pytorch_model*.bin*"]
# Causal masks that old transformers versions stored beside the weights.
_MASK_BUFFERS = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")
# What torch.load(weights_only=True) raises for bytes that are damaged or hold more than tensors.
DAMAGED_PICKLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds. weights: CPU tensors as stored, biases that are all zero left out. palette: None if the
    directory has none. vocabulary: None if the model reads no prompt."""

    config: ImageGPTConfig
    weights: dict[str, torch.Tensor]
    palette: Palette | None
    vocabulary: Vocabulary | None


def locate(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """The directory of a checkpoint: a local one, or a hub id downloaded into huggingface_hub's cache.

    Raises CheckpointError if there is neither such a directory nor such a model, or if the hub can't be reached.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; a checkpoint is a directory with {CONFIG}")
    looks_local = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or not text
    if looks_local:
        raise CheckpointError(f"no directory {text!r}")
    # Imported here: only who downloads should wait for it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(text, revision=revision, local_files_only=local_files_only, allow_patterns=_WANTED)
    except HFValidationError as error:
        raise CheckpointError(f"{text!r} is neither a directory nor a model id: {error}") from None
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        where = "in the local cache" if local_files_only else "as a directory, in the local cache or on the hub"
        raise CheckpointError(f"{text!r} was not found {where}: {error}") from None
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{text!r} is no directory, and the hub did not give it: {error}") from None
    return Path(folder)


def read(folder: Path) -> Checkpoint:
    """Reads and checks a checkpoint directory. Raises CheckpointError naming the file that is missing or wrong."""
    config_file = folder / CONFIG
    if not config_file.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{config_file} is missing (found in {folder}: {found})")
    config = ImageGPTConfig.from_json(config_file.read_bytes(), source=str(config_file))
    source, weights = _read_weights(folder)
    weights = check_weights(config, weights, source=str(source))
    palette = read_palette(folder, config)
    vocabulary = _read_vocabulary(folder, config)
    return Checkpoint(config, weights, palette, vocabulary)


def check_weights(config: ImageGPTConfig, weights: dict[str, torch.Tensor], *, source: str) -> dict[str, torch.Tensor]:
    """The tensors a model of this config uses. Raises CheckpointError for missing, misshapen or non-finite ones."""
    required, optional = config.tensor_shapes(), config.bias_shapes()
    missing = sorted(required.keys() - weights.keys())
    if missing:
        raise CheckpointError(f"{source} lacks {_some(missing)}")
    extra = sorted(
        name for name in weights.keys() - required.keys() - optional.keys() if not _MASK_BUFFERS.fullmatch(name)
    )
    if extra:
        warnings.warn(f"{source} also holds {_some(extra)}, which an Image GPT does not use", stacklevel=3)
    kept = {}
    for name, shape in {**required, **optional}.items():
        if name not in weights:
            continue
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{source}: {name} has shape {tuple(tensor.shape)}, config.json asks for {shape}")
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{source}: {name} is {tensor.dtype}, expected a floating-point tensor")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{source}: {name} holds NaN or infinite values")
        if name in optional and not bool(tensor.any()):
            continue
        kept[name] = tensor.contiguous()
    return kept


def write(
    folder: str | os.PathLike[str],
    config: ImageGPTConfig,
    weights: dict[str, torch.Tensor],
    palette: Palette | None,
    vocabulary: Vocabulary | None,
) -> None:
    """Writes a directory that transformers' ImageGPT classes open as well. Nothing half-written stays behind."""

    def fill(target: Path) -> None:
        (target / CONFIG).write_text(config.to_json() + "\n")
        tensors = dict(weights)
        # transformers' class has biases everywhere and would start those it doesn't find at random.
        for name, shape in config.bias_shapes().items():
            tensors.setdefault(name, torch.zeros(shape, dtype=tensors["lm_head.weight"].dtype))
        save_file({k: v.contiguous() for k, v in tensors.items()}, target / SAFETENSORS, metadata={"format": "pt"})
        if palette is not None:
            (target / PROCESSOR).write_text(json.dumps(processor_config(config, palette), indent=2) + "\n")
        if vocabulary is not None:
            (target / PROMPT).write_text(vocabulary.to_json() + "\n")

    write_folder(folder, fill)


def processor_config(config: ImageGPTConfig, palette: Palette) -> dict[str, Any]:
    """What transformers' ImageGPTImageProcessor reads: how an image becomes a canvas, and the palette."""
    return {
        "image_processor_type": "ImageGPTImageProcessor",
        "clusters": [[float(v) for v in row] for row in palette.clusters],
        "do_color_quantize": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 2,
        "size": {"height": config.height, "width": config.width},
    }


def _read_weights(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    for name, reader in ((SAFETENSORS, _read_safetensors), (PICKLE, _read_pickle)):
        path, index = folder / name, folder / f"{name}.index.json"
        if path.is_file():
            return path, reader(path)
        if index.is_file():
            return index, _read_shards(index, reader)
    raise CheckpointError(f"{folder} holds no weights: neither {SAFETENSORS} nor {PICKLE}, whole or sharded")


def _read_shards(index: Path, reader: Any) -> dict[str, torch.Tensor]:
    data = _read_json(index)
    shard_of = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(v, str) for v in shard_of.values()):
        raise CheckpointError(f'{index} has no "weight_map" from tensor names to file names')
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard or shard in {"", ".", ".."}:
            raise CheckpointError(f"{index} names a file outside its directory: {shard!r}")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names {shard}, which is missing")
        weights.update(reader(index.parent / shard))
    missing = sorted(shard_of.keys() - weights.keys())
    if missing:
        raise CheckpointError(f"{index} promises {_some(missing)}, which no shard holds")
    return weights


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED_PICKLE as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} is damaged, or holds more than tensors: {reason[0]}") from None
    if not isinstance(data, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in data.items()
    ):
        raise CheckpointError(f"{path} must hold a dictionary from names to tensors")
    return data


def read_palette(folder: Path, config: ImageGPTConfig) -> Palette | None:
    processor = folder / PROCESSOR
    if processor.is_file():
        data = _read_json(processor)
        clusters = data.get("clusters") if isinstance(data, dict) else None
        if clusters is not None:
            return _palette(clusters, config, str(processor))
    for name in PALETTE_ARRAYS:
        path = folder / name
        if path.is_file():
            return read_palette_array(path, config)
    return None


def read_palette_array(path: Path, config: ImageGPTConfig) -> Palette:
    """A palette from a .npy file, as OpenAI published it (kmeans_centers.npy)."""
    return _matching(Palette.from_file(path), config, str(path))


def _palette(clusters: Any, config: ImageGPTConfig, source: str) -> Palette:
    try:
        palette = Palette(np.asarray(clusters, dtype=np.float32))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: {error}") from None
    return _matching(palette, config, source)


def _matching(palette: Palette, config: ImageGPTConfig, source: str) -> Palette:
    if palette.n_colors != config.n_colors:
        raise CheckpointError(f"{source} has {palette.n_colors} colours, the model has {config.n_colors}")
    return palette


def _read_vocabulary(folder: Path, config: ImageGPTConfig) -> Vocabulary | None:
    path = folder / PROMPT
    if not config.n_words:
        return None
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the model reads prompts of {config.n_words} words")
    try:
        vocabulary = Vocabulary.from_json(path.read_text())
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if (vocabulary.n_words, vocabulary.max_words) != (config.n_words, config.prompt_length):
        raise CheckpointError(
            f"{path} has {vocabulary.n_words} words in prompts of up to {vocabulary.max_words}, "
            f"the model {config.n_words} and {config.prompt_length}"
        )
    return vocabulary


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
