"""Trains an Image GPT: on the scenes the project draws, or on a folder of somebody's images.

The folder `out` is a checkpoint directory from the first grid of samples on (the averaged weights, ready to draw from),
with what training needs beside it in out/training: state.pt to go on from, log.csv, loss.png, samples-*.png. All that
happens depends on the step alone: a run that was killed and started again ends with the weights of one that was not.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import torch

from fastigpt import checkpoint
from fastigpt.bundled import BUNDLED
from fastigpt.config import ImageGPTConfig
from fastigpt.engine.choose import as_device
from fastigpt.files import check_folder_writable, replacing
from fastigpt.palette import Palette
from fastigpt.training.data import Data, Folder, Scenes, scene_vocabulary
from fastigpt.training.run import Run, Settings, say

N_COLORS = 512
_SIZES = {"n_layer": 5, "n_head": 3, "n_embd": 192, "height": 32, "width": 32}


def train(
    out: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    init: str | os.PathLike[str] | None = None,
    resolution: int | None = None,
    n_layer: int | None = None,
    n_head: int | None = None,
    n_embd: int | None = None,
    steps: int = Settings.steps,
    batch_size: int = Settings.batch_size,
    learning_rate: float = Settings.learning_rate,
    warmup: int = Settings.warmup,
    weight_decay: float = Settings.weight_decay,
    ema_decay: float = Settings.ema_decay,
    prompt_dropout: float = Settings.prompt_dropout,
    seed: int = Settings.seed,
    device: str = "cpu",
    dtype: str = Settings.dtype,
    compile: bool = False,
    threads: int | None = None,
    save_seconds: float = 30.0,
    log_every: int = 20,
    sample_every: int = 1000,
    progress: bool | None = None,
) -> Path:
    """Trains, or goes on with the training that `out` holds, and returns `out`, a checkpoint directory.

    images: a folder of images to learn (with a palette of its own, without prompts); None: the captioned scenes, which
    are 32 × 32. init: the checkpoint to start from, a directory, a hub id or "bundled"; shape and palette are its, its
    prompt is dropped where `images` come without captions. resolution, n_layer, n_head, n_embd: those of init, else 32,
    5, 3, 192. Settings are those of Settings. compile: torch.compile, worth its half
    minute in a long run. threads: of the CPU, None = torch's choice. save_seconds: at most this long between saves.
    log_every, sample_every: steps between lines of log.csv, and between sample grids, which come with an export of the
    checkpoint. progress: a bar; None = when stderr is a terminal, else a line for every line of the log.

    Raises ValueError for bad settings, a folder without images, sizes that are not init's, or an `out` that holds a
    training with other settings (the differences are named); CheckpointError for a bad init; OSError if `out` cannot be
    written.
    """
    settings = Settings(
        steps, batch_size, learning_rate, warmup, weight_decay, Settings.clip, ema_decay, prompt_dropout, seed, dtype
    )
    if not save_seconds > 0:
        raise ValueError(f"save_seconds must be positive, not {save_seconds!r}")
    for name, value in (("log_every", log_every), ("sample_every", sample_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value!r}")
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "height": resolution, "width": resolution}
    begun = None if init is None else _begun(init, sizes, captioned=images is None)
    if begun is None and images is None and resolution not in (None, 32):
        raise ValueError(f"the scenes are drawn at 32 × 32; resolution={resolution} needs a folder of images")
    if threads is not None:
        torch.set_num_threads(threads)
    folder = Path(out)
    check_folder_writable(folder / "training")
    data = _data(folder, images, begun, _SIZES["height"] if resolution is None else resolution, seed)
    if begun is not None:
        config = begun.config
    else:
        words = data.vocabulary
        config = ImageGPTConfig(
            **{name: _SIZES[name] if size is None else size for name, size in sizes.items()},
            n_colors=data.palette.n_colors,
            n_words=words.n_words if words else 0,
            prompt_length=words.max_words if words else 0,
        )
    run = Run(folder, config, settings, data, as_device(device), compile)
    if init is not None and begun is not None:
        run.begin_from(os.fspath(init), begun.weights)
    run.resume()
    # Nothing is written before all has been accepted.
    (folder / "training").mkdir(parents=True, exist_ok=True)
    _keep_palette(folder, data.palette)
    run.loop(save_seconds, log_every, sample_every, progress)
    return folder


def _begun(init: str | os.PathLike[str], sizes: dict[str, int | None], *, captioned: bool) -> checkpoint.Checkpoint:
    """The checkpoint a training starts from, without its prompt where the data has no captions."""
    found = checkpoint.read(BUNDLED if init == "bundled" else checkpoint.locate(init))
    config, weights = found.config, found.weights
    differ = [
        f"{k}: {getattr(config, k)} there, {v} asked for"
        for k, v in sizes.items()
        if v not in (None, getattr(config, k))
    ]
    if differ:
        raise ValueError(f"init={os.fspath(init)!r} has another shape ({'; '.join(differ)})")
    if config.height != config.width:
        raise ValueError(
            f"training needs a square canvas, that of {os.fspath(init)!r} is {config.height} × {config.width}"
        )
    if found.palette is None:
        raise ValueError(f"init={os.fspath(init)!r} has no palette")
    if weights.keys() & config.bias_shapes().keys():
        raise ValueError(f"init={os.fspath(init)!r} has biases, which training does not know")
    if captioned:
        words = scene_vocabulary().words
        if found.vocabulary is None or found.vocabulary.words != words or config.height != 32:
            raise ValueError(
                f"init={os.fspath(init)!r} was not trained on the scenes; name a folder of images to train it on"
            )
        return found
    config = dataclasses.replace(config, n_words=0, prompt_length=0)
    weights = {name: tensor for name, tensor in weights.items() if name in config.tensor_shapes()}
    return checkpoint.Checkpoint(config, weights, found.palette, None)


def _data(
    folder: Path,
    images: str | os.PathLike[str] | None,
    begun: checkpoint.Checkpoint | None,
    resolution: int,
    seed: int,
) -> Data:
    """A run that goes on keeps the palette it began with, and one that starts from a checkpoint the checkpoint's."""
    stored = _palette_file(folder)
    palette = Palette.from_file(stored) if stored.is_file() else begun.palette if begun else None
    if images is None:
        return Scenes(seed, palette)
    side = begun.config.height if begun else resolution
    return Folder(images, side, n_colors=N_COLORS, seed=seed, warn=say, palette=palette)


def _keep_palette(folder: Path, palette: Palette) -> None:
    if not _palette_file(folder).is_file():
        with replacing(_palette_file(folder)) as path:
            np.save(path, palette.clusters)


def _palette_file(folder: Path) -> Path:
    return folder / "training" / "clusters.npy"
