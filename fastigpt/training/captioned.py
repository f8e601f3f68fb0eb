"""Trains a model of captions and 128 × 128 scenes in Janus's layout, in two stages that share a folder.

First the tokenizer (training/tokenizer.py), then the transformer (training/transformer.py), after which the folder is a
checkpoint. A stage goes on if the folder holds it; all that happens depends on the step alone.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from fastigpt import checkpoint
from fastigpt.families.janus import Janus
from fastigpt.files import check_folder_writable
from fastigpt.scalars import whole
from fastigpt.training import tokenizer, transformer
from fastigpt.training.run import SEEDS
from fastigpt.training.stages import Stage, StageSettings
from fastigpt.training.undisturbed import undisturbed

STAGES = {"tokenizer": tokenizer.DEFAULTS, "transformer": transformer.DEFAULTS}
_MOST = 2**31


@undisturbed
def train_stage(
    stage: str,
    out: str | os.PathLike[str],
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    n_scenes: int | None = None,
    init: str | os.PathLike[str] | None = None,
    seed: int = 0,
    compile: bool = False,
    threads: int | None = None,
    save_seconds: float = 60.0,
    log_every: int = 20,
) -> Path:
    """Trains "tokenizer" or "transformer", or goes on with it, and returns `out`.

    steps, batch_size, learning_rate: those of STAGES where they are None. A run that goes on may ask for other steps
    while neither number of them has begun to lower the learning rate. n_scenes: that the transformer encodes once and
    is shown over and over, None = 80,000. init: a model of these stages whose weights the transformer starts from, with
    the same tokenizer; another seed shows it other scenes. compile: the transformer's steps, with torch.compile.
    threads: parts of a batch that are computed beside each other, with one thread of the CPU each; None = 2. Both
    decide how sums are rounded, so a run that goes on keeps them.

    Raises ValueError or TypeError, before any work, for a bad argument or an `out` that holds a training with other
    settings; CheckpointError for a transformer without a trained tokenizer; OSError if `out` cannot be written.
    """
    if not isinstance(stage, str) or stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}, not {stage!r}")
    if not isinstance(out, (str, os.PathLike)):
        raise TypeError(f"out must be a path, not {out!r}")
    given = {"steps": steps, "batch_size": batch_size, "parts": threads}
    numbers: dict[str, Any] = {name: whole(name, value, 1, _MOST) for name, value in given.items() if value is not None}
    if learning_rate is not None:
        if isinstance(learning_rate, bool) or not isinstance(learning_rate, (int, float)) or not 0 < learning_rate < 1:
            raise ValueError(f"learning_rate must be a positive number below 1, not {learning_rate!r}")
        numbers["learning_rate"] = float(learning_rate)
    if isinstance(save_seconds, bool) or not isinstance(save_seconds, (int, float)) or not save_seconds > 0:
        raise ValueError(f"save_seconds must be a positive number, not {save_seconds!r}")
    whole("log_every", log_every, 1)
    settings = dataclasses.replace(STAGES[stage], seed=whole("seed", seed, 0, SEEDS - 1), **numbers)
    folder = Path(out)
    if stage == "tokenizer":
        if n_scenes is not None:
            raise ValueError("n_scenes was given, but the tokenizer never sees a scene twice")
        if init is not None:
            raise ValueError("init was given, but only the transformer starts from weights")
        if compile:
            raise ValueError("compile was given, but only the transformer can be compiled")
        check_folder_writable(folder / "training")
        run: Stage = tokenizer.TokenizerStage(folder, settings)
    else:
        count = transformer.N_SCENES if n_scenes is None else whole("n_scenes", n_scenes, 1, 10**7)
        check_folder_writable(folder / "training")
        run = _transformer(folder, settings, count, compile, init)
    run.resume()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run.loop(save_seconds=save_seconds, log_every=log_every)
    finally:
        torch.set_num_threads(before)
    return folder


def _transformer(
    folder: Path, settings: StageSettings, n_scenes: int, compile: bool, init: str | os.PathLike[str] | None
) -> Stage:
    if init is None:
        return transformer.TransformerStage(folder, settings, n_scenes=n_scenes, compile=compile)
    name, begun = os.fspath(init), checkpoint.read(checkpoint.locate(init))
    if not isinstance(begun, Janus):
        raise ValueError(f"init={name!r} is no model of captions and scenes")
    sizes = {size: getattr(begun.config, size) for size in transformer.SIZES}
    stage = transformer.TransformerStage(folder, settings, n_scenes=n_scenes, sizes=sizes, compile=compile)
    stage.begin_from(name, begun)
    return stage
