"""One door for files that strangers wrote: what is not a file of a sane size is refused before it is opened, and
whatever a reader raises becomes a CheckpointError that names the file."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastigpt.errors import CheckpointError
from fastigpt.scalars import shown as shown_value

JSON_LIMIT = 16 << 20  # bytes; 65,536 colours take 7 MB


def short(value: object, limit: int = 80) -> str:
    """repr for error messages: values come from files and may be as long as they like, tensors may have no memory."""
    if isinstance(value, torch.Tensor):
        return shown_value(value)
    try:
        text = repr(value)
    except Exception:  # an int of more than 4,300 digits, lists in lists in lists, whatever a stranger's repr raises
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    return text if len(text) <= 400 else text[:200] + "..." + text[-100:]


@contextmanager
def refusing(path: str | os.PathLike[str], what: str = "is damaged") -> Iterator[None]:
    """Turns every exception of the block into a CheckpointError: "<path> <what>: <reason>".

    Exception and not a list of them: readers of pickles, arrays and safetensors are parsers run on bytes that anyone
    may have made up, and raise what their innards happen to raise (TokenError, IndexError, struct.error,
    AssertionError, MemoryError, RecursionError were seen).
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        if not isinstance(error, (ValueError, OSError, RuntimeError)) or not reason:
            reason = f"{type(error).__name__} {reason}".strip()
        raise CheckpointError(f"{f'{shown(path)} {what}'.strip()}: {reason}") from None


def exists(path: Path) -> bool:
    """Whether there is anything of that name, a broken link included."""
    return os.path.lexists(path)


def file_size(path: Path) -> int:
    """Bytes of a file. CheckpointError if it is missing, or a directory, a pipe or a device, which may never end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{shown(path)} cannot be read: {reason}") from None
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise CheckpointError(f"{shown(path)} is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, expected a file")
    return found.st_size


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole file. CheckpointError if it is no file, longer than `limit` bytes or unreadable."""
    size = file_size(path)
    if size > limit:
        raise CheckpointError(f"{shown(path)} has {size} bytes, expected at most {limit}")
    with refusing(path, "cannot be read"), open(path, "rb") as file:
        return file.read(limit)


def read_json(path: Path) -> Any:
    return parse_json(read_bytes(path, JSON_LIMIT), shown(path))


def parse_json(text: str | bytes, source: str) -> Any:
    """JSON in UTF-8, 16 or 32, in which no key comes twice. CheckpointError names `source`."""
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{source} is not JSON: {str(error)[:300] or type(error).__name__}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {short(twice)} comes twice")
    return found
