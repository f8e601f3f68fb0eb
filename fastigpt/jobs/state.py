"""How far a job is, who draws it, and how long it will take. Reads names, records and claims: no torch."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from fastigpt.jobs.claims import claimant
from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.parameters import Parameters
from fastigpt.jobs.records import Damaged, Record
from fastigpt.jobs.store import open_store

WINDOW = 600.0  # seconds of the past that the rate is taken from


@dataclass(frozen=True)
class Status:
    """directory, parameters: which job. done: images that are committed, of parameters.n. complete: all were read and
    found right; tokens_sha256 is then that of all tokens. rate: images per second, lately; None while that is not
    known. seconds_left: at that rate. drawers: of each process that has committed shards: process, device, versions,
    images, images_per_second of its own, peak_rss in bytes. drawing: processes that are at a shard now, and which.
    """

    directory: str
    parameters: Parameters
    done: int
    complete: bool
    tokens_sha256: str | None
    rate: float | None
    seconds_left: float | None
    drawers: tuple[dict[str, Any], ...]
    drawing: tuple[tuple[str, int], ...]

    @property
    def devices(self) -> dict[str, int]:
        """Images of each kind of device and versions; more than one is a mixed fleet."""
        found: dict[str, int] = {}
        for drawer in self.drawers:
            key = f"{drawer['device']} ({drawer['versions']})"
            found[key] = found.get(key, 0) + drawer["images"]
        return found


def status(directory: str | os.PathLike[str]) -> Status:
    """The state of a job. directory: a path or a URL. Raises FileNotFoundError if no job lies there, ValueError if
    job.json is damaged."""
    return status_of(JobDirectory.open(open_store(directory)))


def status_of(job: JobDirectory) -> Status:
    committed = job.committed()
    records = []
    for shard in sorted(committed):
        try:
            records.append(job.record(shard))
        except Damaged:
            committed.discard(shard)
    manifest = job.manifest()
    done = job.done(committed)
    rate = None if manifest is not None else recent_rate(records, time.time())
    return Status(
        directory=job.store.name,
        parameters=job.parameters,
        done=done,
        complete=manifest is not None and done == job.parameters.n,
        tokens_sha256=None if manifest is None else manifest.tokens_sha256,
        rate=rate,
        seconds_left=None if not rate else (job.parameters.n - done) / rate,
        drawers=_drawers(records),
        drawing=_claims(job, committed),
    )


def recent_rate(records: list[Record], now: float) -> float | None:
    """Images per second of the last WINDOW seconds in which anything was finished; None where nothing was."""
    recent = [record for record in records if record.finished >= now - WINDOW]
    if not recent:
        return None
    began = max(now - WINDOW, min(record.finished - record.seconds for record in recent))
    return sum(record.n for record in recent) / max(1e-3, max(record.finished for record in recent) - began)


def _drawers(records: list[Record]) -> tuple[dict[str, Any], ...]:
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for record in records:
        key = record.process, record.device, record.versions
        at = found.setdefault(
            key, dict(zip(("process", "device", "versions"), key)) | {"images": 0, "seconds": 0.0, "peak_rss": 0}
        )
        at["images"] += record.n
        at["seconds"] += record.seconds
        at["peak_rss"] = max(at["peak_rss"], record.peak_rss)
    return tuple(at | {"images_per_second": at["images"] / max(1e-3, at["seconds"])} for at in found.values())


def _claims(job: JobDirectory, committed: set[int]) -> tuple[tuple[str, int], ...]:
    found = []
    for name in sorted(job.store.names("claims")):
        shard = name.removesuffix(".json")
        if not shard.isdigit() or int(shard) in committed:
            continue
        try:
            owner = claimant(job.store.read(f"claims/{name}"))
        except FileNotFoundError:
            continue
        if owner is not None and not owner.gone():
            found.append((f"{owner.host}:{owner.pid}", int(shard)))
    return tuple(found)
