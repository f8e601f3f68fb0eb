"""What is known of a shard that is drawn, and of a job that is complete."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from fastigpt.jobs.parameters import parse, read_fields


class Damaged(ValueError):
    """A shard is not what its record says. Names the file, what was found and what was expected."""


@dataclass(frozen=True)
class Drawer:
    """Who drew a shard, and on what. device: the processor or GPU, with the instruction set where that is a choice.
    peak_rss: the most memory that the process has held so far, in bytes. versions: of packages, in a line."""

    host: str
    process: str
    device: str
    versions: str
    peak_rss: int


@dataclass(frozen=True)
class Record:
    """A committed shard: its file in shards/ holds n canvases, from image index `first` on, as uint16 [n, H·W] in an
    .npy of `size` bytes with this sha256. seconds: it took; finished: when, in seconds since 1970."""

    shard: int
    first: int
    n: int
    file: str
    size: int
    sha256: str
    host: str
    process: str
    device: str
    versions: str
    peak_rss: int
    seconds: float
    finished: float

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Record:
        """Raises Damaged."""
        try:
            return read_fields(cls, parse(text, where), where)
        except ValueError as error:
            raise Damaged(str(error)) from None


@dataclass(frozen=True)
class Manifest:
    """Of a job whose shards were all read and found to be right. tokens_sha256: of all tokens in order, as uint16,
    little-endian. shards: of each, in order, shard, first, n, file, size, sha256 and device."""

    n: int
    tokens_sha256: str
    shards: tuple[dict[str, Any], ...]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Manifest:
        """Raises ValueError that names the file."""
        data = parse(text, where)
        shards = data.get("shards")
        if not isinstance(data.get("n"), int) or not isinstance(data.get("tokens_sha256"), str):
            raise ValueError(f"{where} is no manifest of a job")
        if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
            raise ValueError(f"{where} lists no shards")
        return cls(data["n"], data["tokens_sha256"], tuple(shards))
