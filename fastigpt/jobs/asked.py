"""What a run says: of the job, which must agree with job.json where it is there already, and of itself. Plain values,
so that it can be handed to another process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Asked:
    """Of the job; None: not said, so the job's own or, for a new job, the default. prompts: the text of a file with one
    prompt a line. labels: of one with one class a line, or "all". model: where to find it, a directory or a hub id."""

    n: int | None = None
    first_index: int | None = None
    seed: int | None = None
    shard_size: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    prompt: str | None = None
    prompts: str | None = None
    labels: str | None = None
    model: str | None = None
    backend: str | None = None
    dtype: str | None = None
    kv_dtype: str | None = None


@dataclass(frozen=True)
class How:
    """How this run draws; nothing here changes a token. workers: processes that share this machine's memory and
    cores. part: (i, N), i from 1. threads: of one worker; None: torch's choice."""

    device: str | None = None
    batch_size: int | None = None
    window: int | str = "auto"
    draft: str | None = None
    workers: int = 1
    part: tuple[int, int] | None = None
    threads: int | None = None


def as_plain(asked: Asked, how: How) -> dict[str, Any]:
    """For JSON."""
    return {"asked": vars(asked), "how": vars(how)}


def from_plain(data: dict[str, Any]) -> tuple[Asked, How]:
    part = data["how"]["part"]
    return Asked(**data["asked"]), How(**{**data["how"], "part": None if part is None else (part[0], part[1])})
