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
from fastigpt.codecs.palette import MAX_COLORS, Palette
from fastigpt.engine.choose import as_device
from fastigpt.engine.memory import free_memory
from fastigpt.families.image_gpt.checkpoint import Checkpoint
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.families.image_gpt.tensor_names import HEAD
from fastigpt.files import check_folder_writable, replacing
from fastigpt.scalars import whole
from fastigpt.training.data import N_COLORS, Data, Folder, Scenes, scene_vocabulary
from fastigpt.training.run import Run, Settings, say, warmup_for
from fastigpt.training.undisturbed import undisturbed
from fastigpt.untrusted import exists

_MOST_THREADS = 1024
_SIZES = {"n_layer": 5, "n_head": 3, "n_embd": 192, "height": 32, "width": 32}


@undisturbed
def train(
    out: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    init: str | os.PathLike[str] | None = None,
    resolution: int | None = None,
    n_layer: int | None = None,
    n_head: int | None = None,
    n_embd: int | None = None,
    n_colors: int | None = None,
    palette: Palette | str | os.PathLike[str] | None = None,
    steps: int = Settings.steps,
    batch_size: int = Settings.batch_size,
    learning_rate: float = Settings.learning_rate,
    warmup: int | None = None,
    weight_decay: float = Settings.weight_decay,
    ema_decay: float = Settings.ema_decay,
    prompt_dropout: float = Settings.prompt_dropout,
    seed: int = Settings.seed,
    device: torch.device | str = "cpu",
    dtype: str = Settings.dtype,
    compile: bool = False,
    threads: int | None = None,
    save_seconds: float = 30.0,
    log_every: int = 20,
    sample_every: int = 1000,
    progress: bool | None = None,
) -> Path:
    """Trains, or goes on with the training that `out` holds, and returns `out`, a checkpoint directory.

    images: a folder of images to learn (with a palette of its own, without prompts; read as `encode` reads files, cut
    square); None: the captioned scenes, which are 32 × 32. init: the checkpoint to start from, a directory, a hub id or
    "bundled"; shape and palette are its, its prompt is dropped where `images` come without captions. resolution,
    n_layer, n_head, n_embd: those of init, else 32, 5, 3, 192. n_colors: of the palette that is made; None = init's,
    else 512; images with fewer different colours get a palette of those, and a message. palette: one to use instead, or
    the .npy file of one. Settings are those of Settings; warmup None = a tenth of the steps, at most 100. device: one
    that torch can use here. compile: torch.compile, worth its half minute in a long run. threads: of the CPU, 1 to
    1,024, None = torch's choice. save_seconds: at most this long between saves. log_every, sample_every: steps between
    lines of log.csv, and between sample grids, which come with an export of the checkpoint. progress: a bar; None =
    when stderr is a terminal, else a line for every line of the log.

    Raises TypeError or ValueError, before any work, for bad settings, a device that is not there, more memory than is
    free, a folder without images, sizes that are not init's, or an `out` that holds a training with other settings (the
    differences are named); CheckpointError for a bad init; OSError if `out` cannot be written. A loss that is not
    finite raises ValueError as well, later.
    """
    for name, path in (("out", out), ("images", images), ("init", init)):
        if not isinstance(path, (str, os.PathLike)) and (path is not None or name == "out"):
            raise TypeError(f"{name} must be a path, not {path!r}")
    settings = Settings(
        steps,
        batch_size,
        learning_rate,
        warmup_for(steps) if warmup is None else warmup,
        weight_decay,
        Settings.clip,
        ema_decay,
        prompt_dropout,
        seed,
        dtype,
    )
    if isinstance(save_seconds, bool) or not isinstance(save_seconds, (int, float)) or not save_seconds > 0:
        raise ValueError(f"save_seconds must be a positive number, not {save_seconds!r}")
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "height": resolution, "width": resolution}
    for name, value in {"log_every": log_every, "sample_every": sample_every, **sizes}.items():
        if value is not None or name not in sizes:
            whole(name if name not in ("height", "width") else "resolution", value, 1)
    n_threads = None if threads is None else whole("threads", threads, 1, _MOST_THREADS)
    if n_colors is not None:
        whole("n_colors", n_colors, 1, MAX_COLORS)
    place = _device(device)
    given = palette if palette is None or isinstance(palette, Palette) else Palette.from_file(palette)
    if given is not None and n_colors not in (None, given.n_colors):
        raise ValueError(f"n_colors is {n_colors}, but palette has {given.n_colors} colours: give one of them")
    begun = None if init is None else _begun(init, sizes | {"n_colors": n_colors}, given, captioned=images is None)
    if begun is None and images is None and resolution not in (None, 32):
        raise ValueError(f"the scenes are drawn at 32 × 32; resolution={resolution} needs a folder of images")
    used = {name: _SIZES[name] if size is None else size for name, size in sizes.items()}
    most = n_colors or (given.n_colors if given else N_COLORS)
    config = begun.config if begun else ImageGPTConfig(**used, n_colors=most)
    _check_memory(config, batch_size, place)
    folder = Path(out)
    check_folder_writable(folder / "training")
    data = _data(folder, images, begun, given, n_colors, config.height, seed)
    if begun is None:
        words = data.vocabulary
        config = ImageGPTConfig(
            **used,
            n_colors=data.palette.n_colors,
            n_words=words.n_words if words else 0,
            prompt_length=words.max_words if words else 0,
        )
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    run = Run(folder, config, settings, data, place, compile)
    if init is not None and begun is not None:
        run.begin_from(os.fspath(init), begun.weights)
    run.resume()
    # Nothing is written before all has been accepted.
    (folder / "training").mkdir(parents=True, exist_ok=True)
    _keep_palette(folder, data.palette)
    run.loop(save_seconds, log_every, sample_every, progress)
    return folder


def _device(device: torch.device | str) -> torch.device:
    found = as_device(device)
    try:
        torch.empty(1, device=found).add(1).item()
    except Exception as error:  # what a build of torch without this device raises differs
        raise ValueError(f"device is {str(found)!r}, which torch cannot compute on here: {error}") from None
    return found


def _check_memory(config: ImageGPTConfig, batch_size: int, device: torch.device) -> None:
    """Raises ValueError for sizes that cannot be meant: weights, gradients, averages and momenta, and the logits of a
    batch with their gradients, are the least that a step holds."""
    weights = config.n_embd * (
        2 * config.n_colors + config.n_pixels + config.n_layer * (4 * config.n_embd + 2 * config.inner)
    )
    needed, free = 16 * weights + 8 * batch_size * config.n_pixels * config.n_colors, free_memory(device)
    if needed > free:
        raise ValueError(
            f"a model of {weights} weights in batches of {batch_size} × {config.n_pixels} tokens of {config.n_colors} "
            f"colours takes more than {needed >> 30} GiB, {free >> 30} are free: lower n_embd, n_layer, resolution, "
            "batch_size or n_colors"
        )


def _begun(
    init: str | os.PathLike[str], sizes: dict[str, int | None], given: Palette | None, *, captioned: bool
) -> Checkpoint:
    """The checkpoint a training starts from, without its prompt where the data has no captions."""
    found = checkpoint.read(BUNDLED if init == "bundled" else checkpoint.locate(init))
    if not isinstance(found, Checkpoint):
        raise ValueError(f"init={os.fspath(init)!r} is no Image GPT, and training knows no other models")
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
    if given not in (None, found.palette):
        raise ValueError(f"palette is not that of init={os.fspath(init)!r}, whose tokens mean other colours")
    if HEAD not in weights:
        raise ValueError(f"init={os.fspath(init)!r} ({found.architecture}) has no head for colours, {HEAD}")
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
    return Checkpoint(config, weights, found.palette, None)


def _data(
    folder: Path,
    images: str | os.PathLike[str] | None,
    begun: Checkpoint | None,
    given: Palette | None,
    n_colors: int | None,
    side: int,
    seed: int,
) -> Data:
    """A run that goes on keeps the palette it began with, and one that starts from a checkpoint the checkpoint's."""
    palette = begun.palette if begun else given
    if exists(_palette_file(folder)):
        kept = Palette.from_file(_palette_file(folder), value_range=(-1, 1))
        if given not in (None, kept):
            raise ValueError(f"palette is not that of the training which {folder} holds")
        # The same colours: the checkpoint's palette also knows how distances are measured.
        palette = palette if palette is not None and np.array_equal(palette.clusters, kept.clusters) else kept
    if images is None:
        return Scenes(seed, palette, n_colors)
    return Folder(images, side, n_colors=n_colors, seed=seed, warn=say, palette=palette)


def _keep_palette(folder: Path, palette: Palette) -> None:
    if not _palette_file(folder).is_file():
        with replacing(_palette_file(folder)) as path:
            np.save(path, palette.clusters)


def _palette_file(folder: Path) -> Path:
    return folder / "training" / "clusters.npy"
