"""Image GPT's checkpoints in the Hugging Face layout: config.json, the tensors, the palette, the prompt's words."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from fastigpt import save
from fastigpt.codecs.palette import Palette, PaletteCodec
from fastigpt.codecs.preprocessing import Preprocessing
from fastigpt.errors import CheckpointError
from fastigpt.families import image_gpt
from fastigpt.families.image_gpt import processor
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.families.image_gpt.processor import Processor
from fastigpt.families.image_gpt.tensor_names import HEAD, canonical_names, check_tensors
from fastigpt.families.pretrained import CONFIG
from fastigpt.lazy_tensors import in_memory, open_weights
from fastigpt.prompts import Vocabulary, WordReader
from fastigpt.save import CheckpointFiles
from fastigpt.spec import ModelSpec
from fastigpt.tensor_files import SAFETENSORS
from fastigpt.untrusted import exists, read_json, short

PROCESSOR = "preprocessor_config.json"
PROMPT = "prompt.json"
PALETTE_ARRAYS = ("clusters.npy", "kmeans_centers.npy")
CAUSAL = "ImageGPTForCausalImageModeling"
WANTED = (CONFIG, PROCESSOR, PROMPT, *PALETTE_ARRAYS, "model*.safetensors*", "pytorch_model*.bin*")
_WRITTEN = frozenset({CONFIG, SAFETENSORS, PROCESSOR, PROMPT})
BELONGS = _WRITTEN.union(PALETTE_ARRAYS)


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds; a `Pretrained`. weights: CPU tensors as stored, biases that are all zero left out;
    without lm_head.weight if the architecture has no head for colours. palette: None if the directory has none.
    vocabulary: None if the model reads no prompt. architecture: as config.json names it."""

    config: ImageGPTConfig
    weights: dict[str, torch.Tensor]
    palette: Palette | None
    vocabulary: Vocabulary | None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    architecture: str = CAUSAL

    defaults: ClassVar[Mapping[str, Any]] = {}
    no_codec = f"has no palette ({PROCESSOR} or {PALETTE_ARRAYS[0]})"

    @property
    def spec(self) -> ModelSpec:
        return image_gpt.spec(self.config)

    @property
    def codec(self) -> PaletteCodec | None:
        return None if self.palette is None else PaletteCodec(self.palette, self.config.height, self.config.width)

    @property
    def reader(self) -> WordReader | None:
        return None if self.vocabulary is None else WordReader(self.vocabulary, image_gpt.prefix(self.config))

    @property
    def no_head(self) -> str | None:
        if HEAD in self.weights:
            return None
        named = self.architecture
        what = f"a model {named}" if " " in named else f"an {named}"
        return f"is {what} without a head for colours ({HEAD})"

    def canonical(self) -> dict[str, torch.Tensor]:
        weights = self.weights
        if HEAD not in weights and self.architecture != CAUSAL:
            # Engines have a head. This one is never looked at: whatever needs one asks no_head first.
            head = torch.zeros(self.config.tensor_shapes()[HEAD], dtype=torch.float32, device="cpu")
            weights = {**weights, HEAD: head}
        return image_gpt.canonical(self.config, weights)

    def published(self) -> dict[str, str]:
        return image_gpt.published(self.config)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes a directory that transformers' ImageGPT classes open as well. An older checkpoint in it is replaced: a
        reader finds the old one or the new, whenever the writer dies, and files that are no checkpoint's stay."""
        config, palette = self.config, self.palette

        def fill(target: Path) -> None:
            _write_json(target / CONFIG, json.loads(config.to_json()) | {"architectures": [self.architecture]})
            save_file(_tensors_to_write(config, self.weights), target / SAFETENSORS, metadata={"format": "pt"})
            if palette is not None:
                pictures = processor.config(palette, self.preprocessing, config.height, config.width)
                _write_json(target / PROCESSOR, pictures)
            if self.vocabulary is not None:
                (target / PROMPT).write_text(self.vocabulary.to_json() + "\n")

        # A palette beside the weights is read if preprocessor_config.json has none, so it may not be another model's.
        save.replace(folder, fill, _WRITTEN if palette is not None else BELONGS)


def read(folder: Path, files: CheckpointFiles, data: Any) -> Checkpoint:
    """See `Family`."""
    config_file = files.path(CONFIG)
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
    files = CheckpointFiles(folder, BELONGS)
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
