"""The model of a job: loaded in the job's arithmetic, known by the hash of its weights, asked for ranges of images."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from fastigpt.api import load
from fastigpt.bench.machine import device_name
from fastigpt.codecs.palette import PaletteCodec
from fastigpt.codecs.vq import VQCodec
from fastigpt.engine.loop import useful_slots
from fastigpt.engine.memory import synchronize
from fastigpt.families.chat import ChatReader
from fastigpt.jobs.asked import Asked, How
from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.parameters import Parameters, lines
from fastigpt.jobs.records import Drawer
from fastigpt.jobs.store import Store
from fastigpt.model import Model
from fastigpt.options import checked
from fastigpt.owner import this_process
from fastigpt.prompts import ClassReader, PromptReader, WordReader, prefixes

ALL = "all"
"""Labels: of every class, in turn."""

_MOST_TOKENS = 2**16  # that uint16 tells apart
_SHARD_SIZE, _LEAST_SHARD, _SHARDS = 256, 16, 64
_PACKAGES = ("fastigpt", "torch")


def open_job(store: Store, asked: Asked, how: How) -> tuple[JobDirectory, Model]:
    """The job that lies there, or the one that is asked for, made now; and its model. Raises ValueError that names
    every difference if another job lies there."""
    job = JobDirectory.find(store)
    if asked.prompts is not None and asked.labels is not None:
        raise ValueError("give prompts or labels, not both")
    if job is not None:
        check(job, asked)
        return job, load_model(job.parameters, asked.model, how.device)
    if asked.n is None:
        raise ValueError(f"n was not given, and {store.name} holds no job yet: how many images?")
    backend = asked.backend or "auto"
    model = load(
        asked.model,
        device=_device(how.device, backend),
        backend=backend,
        dtype=asked.dtype,
        kv_dtype=asked.kv_dtype,
    )
    text = asked.prompts if asked.labels is None else labels_text(asked.labels, model.reader)
    job = JobDirectory.make(store, _parameters(asked, how, model, text), text)
    check(job, asked)  # another process may have been faster
    job.parameters.check({"model_sha256": model_sha256(model)}, store.name)
    return job, model


def check(job: JobDirectory, asked: Asked) -> None:
    """Raises ValueError that names every difference between a job and what is asked for. Of models only hashes are
    compared: see load_model."""
    said = {name: value for name, value in vars(asked).items() if name not in ("model", "prompts", "labels")}
    if said["backend"] == "auto":
        said["backend"] = None
    if asked.prompts is not None:
        said["prompts_sha256"] = _sha256(asked.prompts.encode())
    if asked.labels is not None:
        text = _every_class(job.parameters.n_prompts or 0) if asked.labels == ALL else asked.labels
        said["prompts_sha256"] = _sha256(text.encode())
    job.parameters.check(said, job.store.name)


def load_model(parameters: Parameters, name: str | None, device: str | None) -> Model:
    """The model of a job, from `name` or from where the job found it. Raises ValueError if it is another one."""
    found = load(
        parameters.model if name is None else name,
        device=_device(device, parameters.backend),
        backend=parameters.backend,
        dtype=parameters.dtype,
        kv_dtype=parameters.kv_dtype,
    )
    digest = model_sha256(found)
    if digest != parameters.model_sha256:
        raise ValueError(
            f"model {found.name} is another one than the job's: sha256 {digest[:16]}… of its weights, palette and "
            f"config, and the job has {parameters.model_sha256[:16]}…"
        )
    return found


def draws(job: JobDirectory, model: Model, how: How, on_rows: Callable[[int], None] | None = None) -> Any:
    """A function from a range of image indices to their tokens, uint16 [m, H·W]. on_rows: called with the number of
    rows of images that have just been finished."""
    p = job.parameters
    batch_size, guidance_scale = how.batch_size, p.guidance_scale
    if guidance_scale is None and "guidance_scale" in model.defaults and (p.prompt or job.prompts):
        guidance_scale = 1.0  # off: what the job says holds, not what is this model's default now
    if batch_size is None and how.workers > 1:  # each would take the memory that it finds free
        slots = useful_slots(model.engine, guided=guidance_scale not in (None, 1.0), sessions=how.workers)
        batch_size = max(1, min(p.shard_size, slots))

    def draw(images: range) -> np.ndarray:
        tokens = model.fill(
            torch.full((len(images), p.n_positions), -1, dtype=torch.int64, device="cpu"),
            on_row=None if on_rows is None else lambda some, row, _: on_rows(len(some)),
            progress=False,
            first_index=images.start,
            prompt=p.prompt if job.prompts is None else [job.prompts[k % len(job.prompts)] for k in images],
            seed=p.seed,
            temperature=p.temperature,
            top_k=p.n_tokens if p.top_k is None else p.top_k,
            top_p=1.0 if p.top_p is None else p.top_p,
            guidance_scale=guidance_scale,
            negative_prompt=p.negative_prompt,
            batch_size=batch_size,
            window=how.window,
            draft=how.draft,
        )
        synchronize(model.device)
        return tokens.numpy().astype(np.uint16)

    return draw


def drawer_of(model: Model) -> Callable[[], Drawer]:
    """Who draws, for records: this process with this model."""
    owner, device = this_process(), device_name(model.device)
    isa = getattr(model.engine, "isa", None)
    told = f"{model.device.type}: {device}" + (f", {isa}" if isa else "")
    versions = ", ".join(f"{name} {number}" for name, number in _versions().items())
    return lambda: Drawer(owner.host, f"{owner.host}:{owner.pid}", told, versions, peak_rss())


def peak_rss() -> int:
    """The most memory this process has held, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def labels_text(labels: str, reader: PromptReader | None) -> str:
    """A file of labels, one a line, of what was asked for. Raises ValueError for a model that knows no classes."""
    if not isinstance(reader, ClassReader):
        raise ValueError("labels were given, but this model knows no classes")
    return _every_class(reader.n_classes) if labels == ALL else labels


def _every_class(count: int) -> str:
    return "".join(f"{number}\n" for number in range(count))


def prompt_lines(text: str) -> list[str]:
    """The lines of a file of prompts. Raises ValueError that names the first that is empty."""
    found = lines(text)
    empty = next((i for i, line in enumerate(found, 1) if not line.strip()), None)
    if empty is not None:
        raise ValueError(f"prompts: line {empty} of {len(found)} is empty")
    return found


def model_sha256(model: Model) -> str:
    """Of all that decides which tokens a model draws and how they look: its config, weights, palette and words. The
    same for the same numbers in other files."""
    total = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True).encode())
    weights = model.pretrained.canonical()
    for name in sorted(weights):
        tensor = weights[name]
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    if isinstance(model.codec, PaletteCodec):
        total.update(model.codec.palette.colors.tobytes())
    if isinstance(model.codec, VQCodec):
        for name, tensor in sorted(model.codec.weights.items()):
            total.update(f"{name} {list(tensor.shape)}\n".encode())
            total.update(tensor.float().flatten().view(torch.uint8).numpy().data)
    if isinstance(model.reader, WordReader):
        total.update(model.reader.vocabulary.to_json().encode())
    if isinstance(model.reader, ChatReader):
        total.update(f"{model.reader.format} {model.reader.tokenizer}".encode())
    return total.hexdigest()


def _parameters(asked: Asked, how: How, model: Model, text: str | None) -> Parameters:
    """text: of the file of prompts or labels."""
    assert asked.n is not None
    if asked.prompt is not None and text is not None:
        raise ValueError("give prompt or label, one for all images, or prompts or labels, one for each; not both")
    prompts = None if text is None else prompt_lines(text)
    names = ("first_index", "seed", "temperature", "top_k", "top_p", "guidance_scale", "negative_prompt")
    given = {name: value for name in names if (value := getattr(asked, name)) is not None}
    read: list[str] | str | None = asked.prompt if prompts is None else prompts
    options = checked(
        {**given, "prompt": read, "window": how.window, "batch_size": how.batch_size},
        asked.n,
        model.spec,
        model.defaults,
    )
    for name in ("prompt", "negative_prompt"):
        if getattr(asked, name) is not None:
            prefixes(getattr(asked, name), 1, model.reader, name)
    for i, line in enumerate(prompts or (), 1):
        try:
            prefixes(line, 1, model.reader)
        except ValueError as error:
            raise ValueError(f"prompts, line {i}: {error}") from None
    spec, drawing = model.spec, options.drawing
    if spec.n_tokens > _MOST_TOKENS:
        raise ValueError(f"model has {spec.n_tokens} tokens; a job holds at most {_MOST_TOKENS}")
    size = min(_SHARD_SIZE, max(_LEAST_SHARD, asked.n // _SHARDS)) if asked.shard_size is None else asked.shard_size
    return Parameters(
        n=asked.n,
        first_index=options.first_index,
        seed=drawing.seed,
        shard_size=size,
        temperature=drawing.temperature,
        top_k=drawing.top_k if asked.top_k is None else asked.top_k,
        top_p=drawing.top_p,
        guidance_scale=drawing.guidance_scale if asked.guidance_scale is None else asked.guidance_scale,
        negative_prompt=asked.negative_prompt,
        prompt=asked.prompt,
        prompts_sha256=None if text is None else _sha256(text.encode()),
        n_prompts=None if prompts is None else len(prompts),
        model=asked.model,
        model_sha256=model_sha256(model),
        backend=model.backend,
        dtype=str(model.dtype).removeprefix("torch."),
        kv_dtype=str(model.engine.kv_dtype).removeprefix("torch."),
        height=spec.height,
        width=spec.columns,
        n_tokens=spec.n_tokens,
        made_with=_versions(),
    )


def _device(device: str | None, backend: str) -> str | None:
    """backend "cpu" runs on no other device, whatever else there is."""
    return "cpu" if device is None and backend == "cpu" else device


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
