"""The model a user holds: images, tokens and prompts in, images out. Checks arguments, then hands jobs to an engine.

`Model` is whatever a family hands over; `ImageGPT` is one that can also be made from a configuration and weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Self, Unpack

import numpy as np
import torch
from PIL import Image

from fastigpt import checkpoint, images
from fastigpt.arguments import token_array, whole
from fastigpt.bundled import bundled_palette
from fastigpt.codecs import ImageCodec, tokens_of
from fastigpt.codecs.palette import Palette
from fastigpt.codecs.preprocessing import Preprocessing
from fastigpt.drawing import Draws
from fastigpt.engine import Engine
from fastigpt.engine.choose import build
from fastigpt.errors import CheckpointError
from fastigpt.families.image_gpt.checkpoint import CAUSAL, Checkpoint
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.families.pretrained import Pretrained
from fastigpt.generating import Generates
from fastigpt.options import DEFAULTS, LoadOptions, ModelOptions, model_options
from fastigpt.overflow import OverflowWatch, cannot_overflow
from fastigpt.prompts import Vocabulary
from fastigpt.scoring import Scores
from fastigpt.signatures import takes_options
from fastigpt.spec import ModelSpec


class Model(Draws, Scores):
    """A model with an engine. Made by `fastigpt.load` and `from_pretrained`; safe to share between threads.

    config (its family's description), spec, codec (None if the checkpoint has none), defaults (drawing options where
    nothing is said), name, device, dtype, backend say what it is. A model without a head has features and draws
    nothing. Pickles and deep copies hold the weights once and build an engine of their own; copy.copy shares it.
    """

    @takes_options(DEFAULTS)
    def __init__(self, pretrained: Pretrained, **options: Unpack[ModelOptions]) -> None:
        """pretrained: what its family handed over."""
        self.name, load = model_options(options)
        self.pretrained, self.config, self.defaults = pretrained, pretrained.config, pretrained.defaults
        codec, self.reader, self.preprocessing = pretrained.codec, pretrained.reader, pretrained.preprocessing
        spec, canonical = pretrained.spec, pretrained.canonical()
        with self._named():
            # Before there is an engine, so that what is read for it is never in memory beside one.
            self._watch = None if cannot_overflow(spec, canonical) else OverflowWatch(spec, canonical)
            self.engine: Engine = build(spec, canonical, **load)
        self.codec = None if codec is None else codec.on(self.engine.device, self.engine.dtype)

    @classmethod
    @takes_options(DEFAULTS)
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Loads a local directory or a hub id (name_or_path) of a family that is known: see docs/models.md.

        revision: of a hub id, a branch, tag or commit. local_files_only: do not ask the hub. Raises CheckpointError.
        """
        folder = checkpoint.locate(name_or_path, revision=revision, local_files_only=local_files_only)
        found = checkpoint.read(folder)
        kind = ImageGPT if isinstance(found, Checkpoint) else Model
        if not issubclass(kind, cls):
            raise CheckpointError(f"{os.fspath(name_or_path)} holds no {cls.__name__}; open it with fastigpt.load")
        return _made(kind, found, {**options, "name": os.fspath(name_or_path)})

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes a directory that `from_pretrained` opens, and transformers where it knows the model. A checkpoint that
        is there is replaced, its palette and prompt included; whoever reads it meanwhile, or after a kill, finds the
        old one or the new. Other files in it stay."""
        self.pretrained.write(directory)

    def __reduce__(self) -> tuple[Any, ...]:
        told = {
            "name": self.name,
            "device": self.device,
            "dtype": self.dtype,
            "kv_dtype": self.engine.kv_dtype,
            "backend": self.backend,
        }
        return _made, (type(self), self.pretrained, told)

    def __copy__(self) -> Self:
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
            told = self.pretrained.published().get(tensor, tensor) + space + rest
            raise type(error)(f"{self.name or 'model'}: {told}") from None

    def _require_head(self) -> None:
        if self.pretrained.no_head is not None:
            raise CheckpointError(
                f"{self.name or 'the model'} {self.pretrained.no_head}: it gives features, but cannot draw or score "
                "images"
            )

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
        spec = self.spec
        return (
            f"{type(self).__name__}({self.name!r}, {spec.n_layer} layers × {spec.width}, {spec.height}×{spec.columns}, "
            f"backend={self.backend!r}, device={str(self.device)!r}, dtype={self.dtype})"
        )

    # --- drawing: see Draws; scores: see Scores ---------------------------------------------------------------

    def _drafting(self, draft: Model | str | os.PathLike[str]) -> Engine:
        """The engine of a smaller model that may draft for this one."""
        if not isinstance(draft, Model):
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
        """int64 [n, h·w]: images of any size as tokens, resized to the canvas as transformers' PIL processor does, with
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
                f"the checkpoint {self.name!r} {self.pretrained.no_codec}, "
                'so it can read and write tokens only (output_type="tokens")'
            )
        return self.codec


class ImageGPT(Model, Generates):
    """An Image GPT: a token is a pixel's colour. Made by `fastigpt.load`, `from_pretrained`, `from_config`, or from a
    configuration and weights.

    Besides what a Model has: palette (None if the checkpoint has none), vocabulary (None if it reads no prompt),
    architecture, transformers' class, and weights, as they were published or given.
    """

    config: ImageGPTConfig
    pretrained: Checkpoint

    @takes_options(DEFAULTS)
    def __init__(
        self,
        config: ImageGPTConfig,
        weights: dict[str, torch.Tensor],
        *,
        palette: Palette | None = None,
        vocabulary: Vocabulary | None = None,
        preprocessing: Preprocessing | None = None,
        architecture: str = CAUSAL,
        **options: Unpack[ModelOptions],
    ) -> None:
        """config and weights, named and shaped as `config.tensor_shapes()` says. palette: for images. vocabulary: of a
        model that reads prompts. preprocessing: how images become canvases. architecture: transformers' class."""
        how = preprocessing or Preprocessing()
        super().__init__(Checkpoint(config, weights, palette, vocabulary, how, architecture), **options)

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

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.pretrained.weights

    @property
    def palette(self) -> Palette | None:
        return self.pretrained.palette

    @property
    def vocabulary(self) -> Vocabulary | None:
        return self.pretrained.vocabulary

    @property
    def architecture(self) -> str:
        return self.pretrained.architecture

    @property
    def start_token(self) -> int:
        return self.config.start_token


def _made(kind: Any, pretrained: Pretrained, options: ModelOptions) -> Any:
    """A model of what a family handed over, also when it comes out of a pickle: not every class's own constructor takes
    that."""
    model = kind.__new__(kind)
    Model.__init__(model, pretrained, **options)
    return model


@lru_cache(maxsize=1)
def _loaded_draft(name: str, stamp: checkpoint.Stamp | None, device: str, backend: str) -> Model:
    """A loop of calls with the same draft loads it once, and again when its files have changed."""
    return Model.from_pretrained(name, device=device, backend=backend)


def _pictures(given: Any) -> list[Image.Image]:
    return images.as_image_list(given)
