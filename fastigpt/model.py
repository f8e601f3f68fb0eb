"""The model a user holds: images, tokens and prompts in, images out. Checks arguments, then hands jobs to an engine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image

from fastigpt import checkpoint, images
from fastigpt.arguments import is_int64, prompt_ids, token_array, whole
from fastigpt.bundled import bundled_palette
from fastigpt.codecs import ImageCodec, tokens_of
from fastigpt.codecs.palette import Palette, PaletteCodec
from fastigpt.config import ImageGPTConfig
from fastigpt.drawing import Draws
from fastigpt.engine import Engine
from fastigpt.engine.arithmetic import finite
from fastigpt.engine.choose import build
from fastigpt.errors import CheckpointError
from fastigpt.families import image_gpt
from fastigpt.families.tensor_names import HEAD
from fastigpt.options import DEFAULTS, LoadOptions, ModelOptions, model_options
from fastigpt.overflow import OverflowWatch, cannot_overflow
from fastigpt.processor import Preprocessing
from fastigpt.prompts import Vocabulary
from fastigpt.scalars import shown
from fastigpt.signatures import takes_options
from fastigpt.spec import ModelSpec

_SCORING_BATCH = 16  # images scored at a time by nll and features


class ImageGPT(Draws):
    """An Image GPT with an engine. Made by `from_pretrained`, `from_config` or `fastigpt.load`; safe to share between
    threads.

    config, codec (None if the checkpoint has no palette), vocabulary (None if the model reads no prompt), name, device,
    dtype, backend say what it is. A model whose weights lack lm_head.weight (`architecture` names it) has features and
    draws nothing. Pickles and deep copies hold the weights once and build an engine of their own; copy.copy shares it.
    """

    @takes_options(DEFAULTS)
    def __init__(
        self,
        config: ImageGPTConfig,
        weights: dict[str, torch.Tensor],
        *,
        palette: Palette | None = None,
        vocabulary: Vocabulary | None = None,
        preprocessing: Preprocessing | None = None,
        architecture: str = checkpoint.CAUSAL,
        **options: Unpack[ModelOptions],
    ) -> None:
        """config and weights, named and shaped as `config.tensor_shapes()` says. palette: for images. vocabulary: of a
        model that reads prompts. preprocessing: how images become canvases. architecture: transformers' class."""
        self.name, load = model_options(options)
        self.config, self.weights, self.vocabulary = config, weights, vocabulary
        self.codec: ImageCodec | None = None if palette is None else PaletteCodec(palette, config.height, config.width)
        self.preprocessing, self.architecture = preprocessing or Preprocessing(), architecture
        if HEAD not in weights and architecture != checkpoint.CAUSAL:
            # Engines have a head. This one is never looked at: whatever needs one asks _require_head first.
            head = torch.zeros(config.tensor_shapes()[HEAD], dtype=torch.float32, device="cpu")
            weights = {**weights, HEAD: head}
        spec, canonical = image_gpt.spec(config), image_gpt.canonical(config, weights)
        with self._named():
            self.engine: Engine = build(spec, canonical, **load)
        self._watch = None if cannot_overflow(spec, canonical) else OverflowWatch(spec, canonical)

    @classmethod
    @takes_options(DEFAULTS)
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        **options: Unpack[LoadOptions],
    ) -> ImageGPT:
        """Loads a local directory or a hub id (name_or_path): config.json; model.safetensors, whole or sharded, or
        pytorch_model.bin; the palette from preprocessor_config.json, clusters.npy or kmeans_centers.npy.

        revision: of a hub id, a branch, tag or commit. local_files_only: do not ask the hub. Raises CheckpointError.
        """
        folder = checkpoint.locate(name_or_path, revision=revision, local_files_only=local_files_only)
        found = checkpoint.read(folder)
        return cls(
            found.config,
            found.weights,
            palette=found.palette,
            vocabulary=found.vocabulary,
            preprocessing=found.preprocessing,
            architecture=found.architecture,
            name=os.fspath(name_or_path),
            **options,
        )

    @classmethod
    @takes_options(DEFAULTS)
    def from_config(cls, config: ImageGPTConfig, *, seed: int = 0, **options: Unpack[LoadOptions]) -> ImageGPT:
        """A model of this config with random weights, as transformers initialises them: normal with deviation 0.02,
        norms 1; the same for the same seed. For trying shapes and measuring; 512-colour models get the bundled palette,
        so that they can draw (noise)."""
        generator = torch.Generator("cpu").manual_seed(whole("seed", seed, 0, 2**63 - 1))
        weights = {
            name: torch.ones(shape, dtype=torch.float32, device="cpu") for name, shape in config.tensor_shapes().items()
        }
        for tensor in weights.values():
            if tensor.ndim > 1:
                tensor.normal_(0, 0.02, generator=generator)
        palette = bundled_palette()
        return cls(
            config,
            weights,
            palette=palette if palette.n_colors == config.n_colors else None,
            name="random weights",
            **options,
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes a directory that `from_pretrained` and transformers open. A checkpoint that is there is replaced, its
        palette and prompt included; whoever reads it meanwhile, or after a kill, finds the old one or the new. Other
        files in it stay."""
        checkpoint.write(
            directory, self.config, self.weights, self.palette, self.vocabulary, self.preprocessing, self.architecture
        )

    def __reduce__(self) -> tuple[Any, ...]:
        told = {
            "palette": self.palette,
            "vocabulary": self.vocabulary,
            "preprocessing": self.preprocessing,
            "architecture": self.architecture,
            "name": self.name,
            "device": self.device,
            "dtype": self.dtype,
            "kv_dtype": self.engine.kv_dtype,
            "backend": self.backend,
        }
        return _rebuilt, (type(self), self.config, self.weights, told)

    def __copy__(self) -> ImageGPT:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def _check_overflow(self, tokens: torch.Tensor, prefix: torch.Tensor | None) -> None:
        if self._watch is not None:
            with self._named():
                self._watch.check(tokens, prefix)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Engines know no published names: what is wrong with the weights is told with the model's and the
        checkpoint's."""
        try:
            yield
        except CheckpointError as error:
            tensor, space, rest = str(error).partition(" ")
            told = image_gpt.published(self.config).get(tensor, tensor) + space + rest
            raise type(error)(f"{self.name or 'model'}: {told}") from None

    def _require_head(self) -> None:
        if HEAD not in self.weights:
            raise CheckpointError(
                f"{self.name or 'the model'} is {_article(self.architecture)} without a head for colours "
                f"({HEAD}): it gives features, but cannot draw or score images"
            )

    @property
    def palette(self) -> Palette | None:
        """What the tokens of an Image GPT mean; None if the checkpoint has none."""
        return self.codec.palette if isinstance(self.codec, PaletteCodec) else None

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels. Raises ValueError for a model without a codec."""
        return self._require_codec().size

    @property
    def spec(self) -> ModelSpec:
        return self.engine.spec

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.dtype

    @property
    def backend(self) -> str:
        return self.engine.name

    def __repr__(self) -> str:
        c = self.config
        return (
            f"ImageGPT({self.name!r}, {c.n_layer} layers × {c.n_embd}, {c.height}×{c.width}, "
            f"backend={self.backend!r}, device={str(self.device)!r}, dtype={self.dtype})"
        )

    # --- drawing: see Draws -----------------------------------------------------------------------------------

    def _drafting(self, draft: ImageGPT | str | os.PathLike[str]) -> Engine:
        """The engine of a smaller model that may draft for this one."""
        if not isinstance(draft, ImageGPT):
            draft = _loaded_draft(os.fspath(draft), checkpoint.stamp(draft), str(self.device), self.backend)
        draft._require_head()
        mine, theirs = self.spec, draft.spec
        if (mine.height, mine.columns, mine.n_tokens) != (theirs.height, theirs.columns, theirs.n_tokens):
            raise ValueError(
                f"draft draws {theirs.height}×{theirs.columns} of {theirs.n_tokens} tokens, "
                f"this model {mine.height}×{mine.columns} of {mine.n_tokens}"
            )
        if self.codec is not None and draft.codec is not None and self.codec != draft.codec:
            raise ValueError("draft has another palette or codebook: its tokens mean other images")
        if (draft.backend, draft.device) != (self.backend, self.device):
            raise ValueError(
                f"draft runs on {draft.backend} ({draft.device}), this model on {self.backend} ({self.device})"
            )
        return draft.engine

    # --- images and tokens ---------------------------------------------------------------------------------------

    def encode(self, images: Any) -> torch.Tensor:
        """int64 [n, H·W]: images of any size as tokens, resized to the canvas as transformers' PIL processor does, with
        the filter that the checkpoint names. CheckpointError if it asks for what cannot be done, by name.

        images: file names, PIL images of any mode (both turned upright by their EXIF orientation, transparent parts on
        white), arrays [H, W], [H, W, 3], [n, H, W], [n, H, W, 3], tensors [H, W], [3, H, W], [n, H, W], [n, 3, H, W],
        of uint8, bool or floats in [0, 1]; or a list of them (see `fastigpt.images.as_image_list`).
        """
        return self._encode(_pictures(images))

    def _encode(self, pictures: list[Image.Image]) -> torch.Tensor:
        codec, how = self._require_codec(), self.preprocessing
        (height, width) = codec.size
        if how.refused is not None:
            raise CheckpointError(how.refused)
        odd = next((picture.size for picture in pictures if picture.size != (width, height)), None)
        if odd is not None and not how.do_resize:
            raise ValueError(
                f"images must be {width} × {height}, not {odd[0]} × {odd[1]}: {self.name} does not resize (do_resize)"
            )
        return codec.encode(np.stack([images.to_canvas(picture, height, width, how.resample) for picture in pictures]))

    def known_cells(self, pictures: Any, *, rows: int | None = None, mask: Any = None) -> torch.Tensor:
        """bool [n, h·w], True = keep: the tokens of each image that `complete` would keep for the same arguments. One
        is drawn anew if any of the pixels that it stands for is to be."""
        codec = self._require_codec()
        height, width = codec.size
        pictures = images.as_image_list(pictures)
        if rows is not None and mask is not None:
            raise ValueError("give rows or mask, not both")
        if rows is not None:
            h, w = codec.grid
            top = torch.arange(h, device="cpu") < whole("rows", rows, 0, h)
            return top.repeat_interleave(w).repeat(len(pictures), 1)
        if mask is not None:
            anew = images.mask_cells(mask, [picture.size for picture in pictures], height, width)
        else:
            holes = [images.transparent_cells(picture, height, width) for picture in pictures]
            if not any(hole is not None and hole.any() for hole in holes):
                raise ValueError("say what to draw anew: rows=, mask=, or images with transparent parts")
            anew = np.stack([np.zeros((height, width), bool) if hole is None else hole for hole in holes])
        return ~tokens_of(codec, anew)

    def decode(self, tokens: Any) -> np.ndarray:
        """uint8 [n, H, W, 3] from tokens int64 [n, h·w]."""
        codec = self._require_codec()
        return codec.decode(token_array("tokens", tokens, self.spec, whole_canvas=True))

    def preview(self, tokens: Any) -> np.ndarray:
        """uint8 [n, H, W, 3] from tokens int64 [n, h·w] of which some are unknown (−1): grey. See
        `fastigpt.codecs.ImageCodec`."""
        codec = self._require_codec()
        return codec.preview(token_array("tokens", tokens, self.spec, unknown=True, whole_canvas=True))

    def _require_codec(self) -> ImageCodec:
        if self.codec is None:
            raise ValueError(
                f"the checkpoint {self.name!r} has no palette (preprocessor_config.json or clusters.npy), "
                'so it can read and write tokens only (output_type="tokens")'
            )
        return self.codec

    # --- scores --------------------------------------------------------------------------------------------------

    def logits(self, tokens: torch.Tensor, *, prompt: str | Sequence[str] | None = None) -> torch.Tensor:
        """float32 [B, T, n_colors]: [:, i] scores token i given tokens[:, :i]. tokens: int64 [B, T], T ≤ H·W, without
        the start token."""
        self._require_head()
        checked = token_array("tokens", tokens, self.spec)
        return self._logits(checked, self._prefix(prompt, len(checked)))

    def _prefix(self, prompt: str | Sequence[str] | None, count: int) -> torch.Tensor | None:
        """int64 [count, L]: what is read before the tokens; None: no prompt."""
        words = prompt_ids(prompt, count, self.vocabulary)
        if words is None:
            return None
        return torch.tensor([image_gpt.prefix(self.config, ids) for ids in words.tolist()], device="cpu")

    def _logits(self, tokens: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
        self._check_overflow(tokens, prefix)
        with self._named():
            return finite(self.engine.logits(tokens, prefix).float(), self.engine)

    def nll(self, tokens: torch.Tensor, *, prompt: str | Sequence[str] | None = None) -> torch.Tensor:
        """float32 [B]: mean negative log-likelihood, nats per token. tokens: int64 [B, T], T ≤ H·W."""
        self._require_head()
        checked = token_array("tokens", tokens, self.spec)
        prefix = self._prefix(prompt, len(checked))
        parts = []
        for first in range(0, len(checked), _SCORING_BATCH):
            batch = slice(first, first + _SCORING_BATCH)
            logits = self._logits(checked[batch], None if prefix is None else prefix[batch])
            target = checked[batch].to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
            parts.append(loss.mean(1).cpu())
        return torch.cat(parts)

    def features(
        self,
        images_or_tokens: Any,
        layer: int | None = None,
        pool: str | None = "mean",
        *,
        prompt: str | Sequence[str] | None = None,
    ) -> torch.Tensor:
        """float32 [n, n_embd] (pool="mean") or [n, H·W, n_embd] (pool=None): the normed hidden state after `layer`
        blocks (0 to n_layer; None: the middle one), as in the paper's linear probes."""
        depth = self.config.n_layer // 2 if layer is None else whole("layer", layer, 0, self.config.n_layer)
        if not (pool is None or (isinstance(pool, str) and pool == "mean")):
            raise ValueError(f'pool must be "mean" or None, not {shown(pool)}')
        if is_int64(images_or_tokens):
            tokens = token_array("tokens", images_or_tokens, self.spec, whole_canvas=True)
        else:
            tokens = self.encode(images_or_tokens)
        prefix = self._prefix(prompt, len(tokens))
        self._check_overflow(tokens, prefix)
        parts = []
        for first in range(0, len(tokens), _SCORING_BATCH):
            batch = slice(first, first + _SCORING_BATCH)
            with self._named():
                hidden = self.engine.hidden(tokens[batch], depth, None if prefix is None else prefix[batch])
                hidden = finite(hidden.float().cpu(), self.engine)
            parts.append(hidden.mean(1) if pool == "mean" else hidden)
        return torch.cat(parts)


def _rebuilt(
    cls: type[ImageGPT], config: ImageGPTConfig, weights: dict[str, torch.Tensor], told: dict[str, Any]
) -> ImageGPT:
    """A pickled model."""
    return cls(config, weights, **told)


def _article(architecture: str) -> str:
    return f"a model {architecture}" if " " in architecture else f"an {architecture}"


@lru_cache(maxsize=1)
def _loaded_draft(name: str, stamp: checkpoint.Stamp | None, device: str, backend: str) -> ImageGPT:
    """A loop of calls with the same draft loads it once, and again when its files have changed."""
    return ImageGPT.from_pretrained(name, device=device, backend=backend)


def _pictures(given: Any) -> list[Image.Image]:
    return images.as_image_list(given)
