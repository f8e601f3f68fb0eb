"""The functions at the top of the package: load a model, or draw from one in a single call."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from PIL import Image

from fastigpt import checkpoint
from fastigpt.bundled import BUNDLED
from fastigpt.job import Stats
from fastigpt.model import ImageGPT, Model
from fastigpt.options import DEFAULTS, CompleteAnyOptions, LoadOptions, SampleAnyOptions, load_options
from fastigpt.signatures import takes_options

AnyModel = Model | str | os.PathLike[str] | None
"""A model, a directory, a hub id, or None for the model in the package."""


@overload
def load(
    name_or_path: None = ...,
    *,
    revision: str | None = ...,
    local_files_only: bool = ...,
    **options: Unpack[LoadOptions],
) -> ImageGPT: ...
@overload
def load(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = ...,
    local_files_only: bool = ...,
    **options: Unpack[LoadOptions],
) -> Model: ...
@takes_options(DEFAULTS)
def load(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    **options: Unpack[LoadOptions],
) -> Model:
    """A model from a directory or a hub id. None and "scenes-128" come with the package: small models of drawn scenes,
    32 × 32 pixels of a palette and 128 × 128 behind a VQ (which needs the tokenizers package).

    name_or_path, revision (of a hub id: a branch, tag or commit), local_files_only (do not ask the hub): as for
    `Model.from_pretrained`. Raises CheckpointError.
    """
    model = Model.from_pretrained(
        BUNDLED if name_or_path is None else name_or_path,
        revision=revision,
        local_files_only=local_files_only,
        **options,
    )
    if name_or_path is None:
        model.name = "fastigpt's bundled scenes"
    return model


@lru_cache(maxsize=1)
def _kept(name: str | None, stamp: checkpoint.Stamp | None, **options: Any) -> Model:
    """A loop of calls with the same model should not load it anew each time; one is kept while its files are the same
    (`stamp`)."""
    return load(name, **options)


def _model(model: AnyModel, options: LoadOptions) -> Model:
    if not isinstance(model, Model):
        stamp = None if model is None else checkpoint.stamp(model)
        return _kept(None if model is None else os.fspath(model), stamp, **options)
    if any(value != DEFAULTS.get(name) for name, value in options.items()):
        raise ValueError("model is loaded already: device, dtype, kv_dtype and backend were chosen when it was")
    return model


@overload
def sample(
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: Literal["pil"] = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[SampleAnyOptions],
) -> list[Image.Image]: ...
@overload
def sample(
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: Literal["pil"] = ...,
    return_stats: Literal[True],
    **options: Unpack[SampleAnyOptions],
) -> tuple[list[Image.Image], Stats]: ...
@overload
def sample(
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: Literal["np"],
    return_stats: Literal[False] = ...,
    **options: Unpack[SampleAnyOptions],
) -> np.ndarray: ...
@overload
def sample(
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: Literal["np"],
    return_stats: Literal[True],
    **options: Unpack[SampleAnyOptions],
) -> tuple[np.ndarray, Stats]: ...
@overload
def sample(
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: Literal["pt", "tokens"],
    return_stats: Literal[False] = ...,
    **options: Unpack[SampleAnyOptions],
) -> torch.Tensor: ...
@overload
def sample(
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: Literal["pt", "tokens"],
    return_stats: Literal[True],
    **options: Unpack[SampleAnyOptions],
) -> tuple[torch.Tensor, Stats]: ...
@overload
def sample(
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: str,
    return_stats: bool = ...,
    **options: Unpack[SampleAnyOptions],
) -> Any: ...
@takes_options(DEFAULTS)
def sample(
    n: int = 1,
    *,
    model: AnyModel = None,
    output_type: str = "pil",
    return_stats: bool = False,
    **options: Unpack[SampleAnyOptions],
) -> Any:
    """Draws n images from a model: a loaded one, a directory, a hub id, or None for the one in the package.

    output_type: "pil" list of images | "np" uint8 [n, H, W, 3] | "pt" uint8 [n, 3, H, W] | "tokens" int64 [n, h·w].
    return_stats: also returns Stats. As `fastigpt.load(model).sample(n)`; the model of the last call is kept.
    """
    load, draw = load_options(options)
    return _model(model, load).sample(n, output_type=output_type, return_stats=return_stats, **draw)


@overload
def complete(
    images: Any,
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: Literal["pil"] = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[CompleteAnyOptions],
) -> list[Image.Image]: ...
@overload
def complete(
    images: Any,
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: Literal["pil"] = ...,
    return_stats: Literal[True],
    **options: Unpack[CompleteAnyOptions],
) -> tuple[list[Image.Image], Stats]: ...
@overload
def complete(
    images: Any,
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: Literal["np"],
    return_stats: Literal[False] = ...,
    **options: Unpack[CompleteAnyOptions],
) -> np.ndarray: ...
@overload
def complete(
    images: Any,
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: Literal["np"],
    return_stats: Literal[True],
    **options: Unpack[CompleteAnyOptions],
) -> tuple[np.ndarray, Stats]: ...
@overload
def complete(
    images: Any,
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: Literal["pt", "tokens"],
    return_stats: Literal[False] = ...,
    **options: Unpack[CompleteAnyOptions],
) -> torch.Tensor: ...
@overload
def complete(
    images: Any,
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: Literal["pt", "tokens"],
    return_stats: Literal[True],
    **options: Unpack[CompleteAnyOptions],
) -> tuple[torch.Tensor, Stats]: ...
@overload
def complete(
    images: Any,
    n: int = ...,
    *,
    model: AnyModel = ...,
    output_type: str,
    return_stats: bool = ...,
    **options: Unpack[CompleteAnyOptions],
) -> Any: ...
@takes_options(DEFAULTS)
def complete(
    images: Any,
    n: int = 1,
    *,
    model: AnyModel = None,
    output_type: str = "pil",
    return_stats: bool = False,
    **options: Unpack[CompleteAnyOptions],
) -> Any:
    """Completes images with a model: a loaded one, a directory, a hub id, or None for the one in the package.

    Result j of image i comes at i·n + j.

    images: as for `Model.encode`. output_type and return_stats: as for `sample`. As
    `fastigpt.load(model).complete(images, n)`; the model of the last call is kept.
    """
    load, draw = load_options(options)
    return _model(model, load).complete(images, n, output_type=output_type, return_stats=return_stats, **draw)
