"""What tests of jobs share: a checkpoint that draws in milliseconds, and jobs whose tokens need no model at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from conftest import PROMPTED, TINY, random_weights

from fastigpt import ImageGPT, ImageGPTConfig, Palette
from fastigpt.jobs.claims import Claims
from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.parameters import Parameters
from fastigpt.jobs.records import Drawer
from fastigpt.jobs.store import LocalStore, Store
from fastigpt.jobs.worker import Worker
from fastigpt.prompts import Vocabulary

PALETTE = Palette(np.random.default_rng(2).uniform(-1, 1, (9, 3)).astype(np.float32))
WORDS = Vocabulary(("-", "red", "blue", "cat", "dog"), 3)


def checkpoint(folder: Path, *, prompted: bool = False, seed: int = 0) -> Path:
    config: ImageGPTConfig = PROMPTED if prompted else TINY
    model = ImageGPT(
        config,
        random_weights(config, seed),
        palette=PALETTE,
        vocabulary=WORDS if prompted else None,
        backend="portable",
    )
    model.save_pretrained(folder)
    return folder


def made_up(store: Store, n: int = 22, shard_size: int = 4) -> JobDirectory:
    """A job in the store whose images `draw` makes up."""
    parameters = Parameters(
        n=n,
        first_index=100,
        seed=0,
        shard_size=shard_size,
        temperature=1.0,
        top_k=None,
        top_p=None,
        guidance_scale=None,
        negative_prompt=None,
        prompt=None,
        prompts_sha256=None,
        n_prompts=None,
        model=None,
        model_sha256="0" * 64,
        backend="cpu",
        dtype="float32",
        kv_dtype="float32",
        height=2,
        width=3,
        n_tokens=97,
        made_with={},
    )
    return JobDirectory.make(store, parameters, None)


def draw(images: range) -> np.ndarray:
    """uint16 [m, 6], as pure a function of the image index as a model's."""
    return (np.array(images)[:, None] * 31 + np.arange(6) * 7).astype(np.uint16) % 97


def drawer() -> Drawer:
    return Drawer("here", f"here:{os.getpid()}", "made up", "none", 1)


def local(path: Path) -> LocalStore:
    store = LocalStore(path)
    store.poll = 0.002
    return store


def worker(job: JobDirectory, **options: object) -> Worker:
    return Worker(job, draw, drawer, **options)  # type: ignore[arg-type]


def patient(job: JobDirectory) -> Claims:
    """Claims of a process that waits for no other machine."""
    from fastigpt.owner import this_process

    return Claims(job.store, this_process(), stale=0.0)


def expected_sha256(path: Path, **sizes: int) -> str:
    """Of all tokens of a made-up job, of a run that nothing breaks."""
    job = made_up(local(path), **sizes)
    worker(job).run()
    return job.seal().tokens_sha256


def files(path: Path) -> set[str]:
    """All files below, hidden ones too."""
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
