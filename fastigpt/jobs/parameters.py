"""What a job draws: all that decides its tokens, written once into job.json. A run that asks for anything else is
refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

FILE = "job.json"
FORMAT = 1


@dataclass(frozen=True)
class Parameters:
    """n images with the image indices first_index … first_index + n − 1; shard s holds the s-th `shard_size` of them.

    prompts_sha256, n_prompts: of the file of prompts; image k reads line k mod n_prompts. prompt: what all images
    read; negative_prompt: what guidance leads all of them away from. model: where it was found, a directory, a hub id,
    or None for the bundled one; model_sha256 is what counts.
    backend, dtype, kv_dtype: as chosen when the job was made. height, width, n_tokens: of the canvas. made_with:
    versions of packages, for people; other versions are not refused.
    """

    n: int
    first_index: int
    seed: int
    shard_size: int
    temperature: float
    top_k: int | None
    top_p: float | None
    guidance_scale: float | None
    negative_prompt: str | None
    prompt: str | None
    prompts_sha256: str | None
    n_prompts: int | None
    model: str | None
    model_sha256: str
    backend: str
    dtype: str
    kv_dtype: str
    height: int
    width: int
    n_tokens: int
    made_with: dict[str, str] = field(compare=False)

    @property
    def n_shards(self) -> int:
        return -(-self.n // self.shard_size)

    @property
    def n_positions(self) -> int:
        return self.height * self.width

    def images(self, shard: int) -> range:
        """The image indices of a shard."""
        first = shard * self.shard_size
        return range(self.first_index + first, self.first_index + min(first + self.shard_size, self.n))

    def differences(self, asked: Mapping[str, Any]) -> list[str]:
        """A sentence for every parameter that is asked for (is not None) and that the job has otherwise."""
        return [
            f"{_NAMES.get(name, name)} is {_shown(getattr(self, name))} in the job, and {_shown(value)} in this run"
            for name, value in asked.items()
            if value is not None and value != getattr(self, name)
        ]

    def check(self, asked: Mapping[str, Any], where: str) -> None:
        """Raises ValueError that names every difference."""
        found = self.differences(asked)
        if found:
            raise ValueError(
                f"{where} holds another job: {'; '.join(found)}. "
                "Leave out what the job knows, or name another directory"
            )

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Parameters:
        """Raises ValueError that names the file for anything but what to_json writes."""
        data = parse(text, where)
        if data.get("format") != FORMAT:
            raise ValueError(f"{where} is of format {data.get('format')!r}, and this fastigpt reads format {FORMAT}")
        read = read_fields(cls, data, where)
        if not (
            min(read.n, read.shard_size, read.height, read.width, read.n_tokens) >= 1
            and read.first_index >= 0
            and 0 <= read.seed < 2**64
            and (read.prompts_sha256 is None) == (read.n_prompts is None)
            and (read.n_prompts is None or read.n_prompts >= 1)
        ):
            raise ValueError(f"{where} holds numbers that no job has")
        return read


# Parameters whose names say little to who runs a job.
_NAMES = {"prompts_sha256": "prompts", "model_sha256": "model"}

_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "None": (type(None),),
    "dict[str, str]": (dict,),
}


def parse(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError that names the file."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where} must hold a JSON object, not {type(data).__name__}")
    return data


def read_fields(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    """A dataclass of plain values from a JSON object; keys it does not know are passed over. Raises ValueError that
    names the file and the key."""
    values = {}
    for known in fields(cls):
        if known.name not in data:
            if known.default is MISSING:
                raise ValueError(f"{where} lacks {known.name!r}")
            continue
        value = data[known.name]
        kinds = tuple(kind for name in str(known.type).split(" | ") for kind in _KINDS[name])
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{where}: {known.name!r} must be {known.type}, not {_shown(value)}")
        values[known.name] = float(value) if isinstance(value, int) and float in kinds else value
    return cls(**values)


def lines(text: str) -> list[str]:
    """Of a file of prompts: ended by line feeds and by nothing else that Unicode knows."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _shown(value: Any) -> str:
    text = "none" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
