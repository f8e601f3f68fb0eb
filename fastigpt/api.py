"""The functions at the top of the package: load a model, or draw from one in a single call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from fastigpt import checkpoint
from fastigpt.bundled import BUNDLED
from fastigpt.model import ImageGPT


def load(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    kv_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
) -> ImageGPT:
    """A model from a directory or a hub id; None: the one that comes with the package, a small model of drawn scenes.

    The arguments are those of `ImageGPT.from_pretrained`. Raises CheckpointError.
    """
    model = ImageGPT.from_pretrained(
        BUNDLED if name_or_path is None else name_or_path,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        backend=backend,
        revision=revision,
        local_files_only=local_files_only,
    )
    if name_or_path is None:
        model.name = "fastigpt's bundled scenes"
    return model


@lru_cache(maxsize=1)
def _kept(name: str | None, stamp: checkpoint.Stamp | None, **options: Any) -> ImageGPT:
    """A loop of calls with the same model should not load it anew each time; one is kept while its files are the same
    (`stamp`)."""
    return load(name, **options)


def _model(
    model: ImageGPT | str | os.PathLike[str] | None,
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
    kv_dtype: torch.dtype | str | None,
    backend: str,
) -> ImageGPT:
    if not isinstance(model, ImageGPT):
        name = None if model is None else os.fspath(model)
        stamp = None if model is None else checkpoint.stamp(model)
        return _kept(name, stamp, device=device, dtype=dtype, kv_dtype=kv_dtype, backend=backend)
    if (device, dtype, kv_dtype, backend) != (None, None, None, "auto"):
        raise ValueError("model is loaded already: device, dtype, kv_dtype and backend were chosen when it was")
    return model


def sample(
    n: int = 1,
    *,
    model: ImageGPT | str | os.PathLike[str] | None = None,
    prompt: str | Sequence[str] | None = None,
    guidance_scale: float | None = None,
    seed: int | None = None,
    first_index: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    output_type: str = "pil",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    kv_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    batch_size: int | None = None,
    window: int | str = "auto",
    draft: ImageGPT | str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    return_stats: bool = False,
) -> Any:
    """Draws n images from a model: an ImageGPT, a directory, a hub id, or None for the one in the package.

    The other arguments are those of `fastigpt.load` and `ImageGPT.sample`.
    """
    return _model(model, device, dtype, kv_dtype, backend).sample(
        n,
        prompt=prompt,
        guidance_scale=guidance_scale,
        seed=seed,
        first_index=first_index,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        output_type=output_type,
        batch_size=batch_size,
        window=window,
        draft=draft,
        progress=progress,
        return_stats=return_stats,
    )


def complete(
    images: Any,
    n: int = 1,
    *,
    rows: int | None = None,
    mask: Any = None,
    particles: int = 1,
    model: ImageGPT | str | os.PathLike[str] | None = None,
    prompt: str | Sequence[str] | None = None,
    guidance_scale: float | None = None,
    seed: int | None = None,
    first_index: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    output_type: str = "pil",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    kv_dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    batch_size: int | None = None,
    window: int | str = "auto",
    draft: ImageGPT | str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    return_stats: bool = False,
) -> Any:
    """Completes images with a model: an ImageGPT, a directory, a hub id, or None for the one in the package.

    The other arguments are those of `fastigpt.load` and `ImageGPT.complete`.
    """
    return _model(model, device, dtype, kv_dtype, backend).complete(
        images,
        n,
        rows=rows,
        mask=mask,
        particles=particles,
        prompt=prompt,
        guidance_scale=guidance_scale,
        seed=seed,
        first_index=first_index,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        output_type=output_type,
        batch_size=batch_size,
        window=window,
        draft=draft,
        progress=progress,
        return_stats=return_stats,
    )
