"""`verify`: reads all that a job holds, compares it with its records, and draws some images again."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.records import Damaged, Record
from fastigpt.jobs.state import status_of
from fastigpt.jobs.store import open_store


@dataclass(frozen=True)
class Redrawn:
    """An image that was drawn again. index: its image index. differs: of its tokens, how many came out otherwise.
    first: the position of the first of those; None: none did. device: on which the job's was drawn."""

    index: int
    differs: int
    first: int | None
    device: str


@dataclass(frozen=True)
class Findings:
    """damaged: a sentence for each shard that is not what its record says. missing: shards without a record, which a
    run draws. complete: all is there and right, and the manifest says so. devices: images by device and versions.
    redrawn: images that were drawn again, on redrawn_on."""

    damaged: tuple[str, ...]
    missing: tuple[int, ...]
    complete: bool
    devices: dict[str, int]
    redrawn: tuple[Redrawn, ...]
    redrawn_on: str | None

    @property
    def right(self) -> bool:
        """Whether nothing is damaged and no image came out otherwise. Missing shards are not wrong."""
        return not self.damaged and not any(image.differs for image in self.redrawn)


def verify(
    directory: str | os.PathLike[str],
    *,
    redraw: int = 0,
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> Findings:
    """Reads every shard of a job and compares it with its record, and the manifest with all of them.

    redraw: so many images are drawn again here, spread over the job and over all devices that drew for it, and
    compared token by token. model, device: for that; None: where the job has it from, and what is there. Changes
    nothing: a damaged shard is drawn anew by the next `run`. Raises FileNotFoundError if no job lies there, ValueError
    if job.json or the manifest is damaged.
    """
    if isinstance(redraw, bool) or not isinstance(redraw, int) or redraw < 0:
        raise ValueError(f"redraw must be a number of images, at least 0, not {redraw!r}")
    job = JobDirectory.open(open_store(directory))
    committed, damaged, right = job.committed(), [], {}
    for shard in sorted(committed):
        try:
            right[shard], _ = job.tokens(shard)
        except Damaged as error:
            damaged.append(str(error))
    missing = tuple(sorted(set(range(job.parameters.n_shards)) - committed))
    manifest = job.manifest()
    if manifest is not None:
        where = f"{job.store.name}/manifest.json"
        damaged += [
            f"{where} has shard {shard} otherwise than its record"
            for shard, listed in enumerate(manifest.shards)
            if shard in right and listed.get("sha256") != right[shard].sha256
        ]
        damaged += [f"{where} lists shard {shard}, which has no record" for shard in missing]
    redrawn: tuple[Redrawn, ...] = ()
    on = None
    if redraw and right:
        redrawn, on = _redraw(job, right, redraw, model, device)
    return Findings(
        damaged=tuple(damaged),
        missing=missing,
        complete=manifest is not None and not damaged and not missing,
        devices=status_of(job).devices,
        redrawn=redrawn,
        redrawn_on=on,
    )


def chosen(records: dict[int, Record], count: int) -> list[tuple[int, int]]:
    """Shards and rows of them: so many images, spread over the job, those of every device in turn."""
    by_device: dict[str, list[tuple[int, int]]] = {}
    for shard, record in records.items():
        by_device.setdefault(record.device, []).extend((shard, row) for row in range(record.n))
    found = []
    for i, images in enumerate(by_device.values()):
        share = min(len(images), count // len(by_device) + (i < count % len(by_device)))
        found += [images[(2 * k + 1) * len(images) // (2 * share)] for k in range(share)]
    return sorted(found)


def _redraw(
    job: JobDirectory,
    records: dict[int, Record],
    count: int,
    model: str | os.PathLike[str] | None,
    device: str | None,
) -> tuple[tuple[Redrawn, ...], str]:
    from fastigpt.jobs.asked import How
    from fastigpt.jobs.drawing import drawer_of, draws, load_model

    loaded = load_model(job.parameters, None if model is None else os.fspath(model), device)
    draw = draws(job, loaded, How(device=device))
    found = []
    for shard, row in chosen(records, count):
        record, tokens = job.tokens(shard)
        index = record.first + row
        unlike = (draw(range(index, index + 1))[0] != tokens[row]).nonzero()[0]
        first = int(unlike[0]) if len(unlike) else None
        found.append(Redrawn(index, len(unlike), first, f"{record.device} ({record.versions})"))
    drawer = drawer_of(loaded)()
    return tuple(found), f"{drawer.device} ({drawer.versions})"
