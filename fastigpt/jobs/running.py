"""`run`: makes a job or goes on with it, in this process or in others, and reads all of it when it is drawn."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Unpack

from fastigpt.arguments import flag, whole
from fastigpt.engine.choose import as_dtype
from fastigpt.jobs.asked import Asked, How
from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.drawing import ALL, check, drawer_of, draws, open_job
from fastigpt.jobs.progress import Rows, watching
from fastigpt.jobs.records import Damaged
from fastigpt.jobs.state import Status, status_of
from fastigpt.jobs.store import Store, open_store
from fastigpt.jobs.worker import Worker
from fastigpt.options import DEFAULTS, SampleAnyOptions
from fastigpt.scalars import integer, real
from fastigpt.signals import stoppable
from fastigpt.signatures import takes_options

_MOST_WORKERS = 1024
_ATTEMPTS = 3  # at drawing shards that are found damaged again and again


@takes_options(DEFAULTS)
def run(
    directory: str | os.PathLike[str],
    n: int | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    labels: str | os.PathLike[str] | Sequence[int | str] | None = None,
    shard_size: int | None = None,
    workers: int | None = None,
    part: tuple[int, int] | None = None,
    ray: str | None = None,
    **options: Unpack[SampleAnyOptions],
) -> Status:
    """Draws n images into a directory, or those of them that are missing there; returns the state of the job.

    directory: a path, or a URL that fsspec opens. A directory that holds a job already knows its parameters: they may
    be left out, and ValueError names all that are given otherwise. Any number of runs may fill it at the same time. A
    damaged shard is drawn anew. Image k, with image index first_index + k, is that of `sample(n=1, first_index=…)`,
    whatever is cut and killed.

    model: a directory, a hub id, or None for the one in the package. prompts: a file with one prompt a line, or the
    prompts; the image with index i reads prompt i mod their number. labels: the same of classes, numbers or names, or
    "all": image i is of class i mod their number, as many of each. prompt, label: of all images, one. shard_size:
    images that are drawn and committed together; None: up to 256. workers: None or 1 draws in this process, more in so
    many others, with the machine's cores dealt out among them; with ray, actors at most. part: (i, N), i from 1 to N:
    draws every N-th shard and no other. ray: "local", "auto" or the address of a cluster, to draw with Ray.

    Raises FileExistsError for a directory with other files, and OSError naming the file that cannot be written. What is
    committed by then stays, and the next run goes on from there; so after Ctrl-C and SIGTERM, which raise
    `fastigpt.signals.Interrupted` in the main thread.
    """
    store = open_store(directory)
    progress = options.pop("progress", None)
    asked = _asked(n, model, prompts, labels, shard_size, options)
    how = _how(workers, part, options)
    found = JobDirectory.find(store)
    if found is not None:
        check(found, asked)
        store.clean()
    show = None if progress is None else flag("progress", progress)
    rows = Rows()
    with stoppable() as signals, watching(store, rows, show):
        for _ in range(_ATTEMPTS):
            if found is None or asked.model is not None or len(found.committed()) < found.parameters.n_shards:
                _fill(store, asked, how, ray, None if workers is None else how.workers, rows, signals.held)
            found = job = JobDirectory.open(store)
            if len(job.committed()) < job.parameters.n_shards:
                break  # another part's are missing
            store.clean()  # after workers that died meanwhile
            try:
                job.seal()
                break
            except Damaged:
                wrong = job.repair()
            for sentence in wrong:
                print(f"{sentence}; it is drawn anew", file=sys.stderr)
        else:
            raise OSError(f"{store.name}: shards are damaged as soon as they are written, the last time: {wrong[0]}")
    return status_of(job)


def _fill(
    store: Store,
    asked: Asked,
    how: How,
    ray: str | None,
    actors: int | None,
    rows: Rows,
    held: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Until no shard is missing, or none of this part."""
    if ray is not None:
        from fastigpt.jobs.ray_actors import run_actors

        run_actors(store, asked, how, ray, actors)
    elif how.workers > 1:
        from fastigpt.jobs.processes import run_processes

        run_processes(store, asked, how)
    else:
        job, model = open_job(store, asked, how)
        Worker(job, draws(job, model, how, rows.add), drawer_of(model), part=how.part, held=held).run()


def _asked(n: Any, model: Any, prompts: Any, labels: Any, shard_size: Any, options: Any) -> Asked:
    said: dict[str, Any] = {}
    for name, value, least in (("n", n, 1), ("shard_size", shard_size, 1)):
        said[name] = None if value is None else whole(name, value, least)
    for name, most in (("first_index", 2**63 - 1), ("seed", 2**64 - 1)):
        value = options.get(name)
        said[name] = None if value is None else whole(name, value, 0, most)
    for name in ("dtype", "kv_dtype"):
        dtype = as_dtype(options.get(name), name)
        said[name] = None if dtype is None else str(dtype).removeprefix("torch.")
    for name in ("prompt", "negative_prompt"):
        said[name] = options.get(name)
        if said[name] is not None and not isinstance(said[name], str):
            raise TypeError(f"{name} must be a string, for all images; prompts of single images go into prompts")
    label = options.get("label")
    if label is not None:
        if said["prompt"] is not None:
            raise ValueError("give prompt or label, not both")
        said["prompt"] = label if isinstance(label, str) else str(integer("label", label, "an int or a name"))
    said["model"] = None if model is None else _checkpoint("model", model)
    said["prompts"] = None if prompts is None else _text("prompts", prompts)
    said["labels"] = None if labels is None else _labels(labels)
    for name, number in (("temperature", real), ("top_k", integer), ("top_p", real), ("guidance_scale", real)):
        value = options.get(name)
        said[name] = None if value is None else number(name, value)
    return Asked(backend=options.get("backend"), **said)


def _how(workers: Any, part: Any, options: Any) -> How:
    count = 1 if workers is None else whole("workers", workers, 1, _MOST_WORKERS)
    if part is not None:
        try:
            i, of = part
        except (TypeError, ValueError):
            raise ValueError(f"part must be (i, N), not {part!r}") from None
        of = whole("part's N", of, 1)
        part = whole("part's i", i, 1, of), of
    draft, device, batch_size = options.get("draft"), options.get("device"), options.get("batch_size")
    window = options.get("window", "auto")
    return How(
        device=None if device is None else str(device),
        batch_size=None if batch_size is None else whole("batch_size", batch_size, 1),
        window=window if isinstance(window, str) else whole("window", window, 1),
        draft=None if draft is None else _checkpoint("draft", draft),
        workers=count,
        part=part,
    )


def _checkpoint(name: str, given: Any) -> str:
    """A hub id, or a directory that is the same from any working directory."""
    where = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    if not isinstance(where, str):
        raise TypeError(f"{name} must be a directory or a hub id, not {type(given).__name__}")
    folder = Path(where).expanduser()
    return str(folder.absolute()) if folder.is_dir() else where


def _labels(labels: Any) -> str:
    if isinstance(labels, str) and labels == ALL:
        return ALL
    if isinstance(labels, (str, os.PathLike)):
        return _text("labels", labels)
    return _text("labels", [each if isinstance(each, str) else str(integer("labels", each)) for each in labels])


def _text(name: str, prompts: str | os.PathLike[str] | Sequence[str]) -> str:
    if isinstance(prompts, (str, os.PathLike)):
        try:
            return Path(prompts).expanduser().read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: {os.fspath(prompts)} is not UTF-8: {error.reason}") from None
    lines = list(prompts)
    if not lines or not all(isinstance(line, str) for line in lines):
        raise TypeError(f"{name} must be a file or a sequence of strings")
    if any("\n" in line for line in lines):
        raise ValueError(f"{name}: each is one line")
    return "".join(f"{line}\n" for line in lines)
