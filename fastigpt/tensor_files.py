"""The files in which a checkpoint directory holds its weights, safetensors or pickles, whole or sharded; and pickles,
which are untrusted: they may hold no more than their own length, and nothing they say is run.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from fastigpt.errors import CheckpointError
from fastigpt.untrusted import exists, file_size, read_json, refusing, short

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX = ".index.json"

Held = TypeVar("Held")


def open_with(
    readers: Mapping[str, Callable[[Path], dict[str, Held]]], folder: Path, path_of: Callable[[str], Path]
) -> tuple[Path, dict[str, Held]]:
    """The file that names the weights of a directory, and what these readers make of it. readers: by the name of the
    whole file, the best first. path_of: where in the directory a file of a name lies."""
    for name, reader in readers.items():
        path, index = path_of(name), path_of(name + INDEX)
        if exists(path):
            return path, reader(path)
        if exists(index):
            return index, _open_shards(index, reader)
    raise CheckpointError(f"{folder} holds no weights: neither {SAFETENSORS} nor {PICKLE}, whole or sharded")


def _open_shards(index: Path, reader: Callable[[Path], dict[str, Held]]) -> dict[str, Held]:
    data = read_json(index)
    shard_of = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(v, str) for v in shard_of.values()):
        raise CheckpointError(f'{index} has no "weight_map" from tensor names to file names')
    stored: dict[str, Held] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard or shard in {"", ".", ".."}:
            raise CheckpointError(f"{index} names a file outside its directory: {short(shard)}")
        if not exists(index.parent / shard):
            raise CheckpointError(f"{index} names {short(shard)}, which is missing")
        held = reader(index.parent / shard)
        stored.update((name, read) for name, read in held.items() if shard_of.get(name) == shard)
    missing = sorted(shard_of.keys() - stored.keys())
    if missing:
        raise CheckpointError(f"{index} promises {some(missing)}, which no shard holds")
    return stored


def load_pickle(path: Path, device: torch.device | str = "cpu", allowed: Sequence[type] = ()) -> object:
    """torch.load of tensors and plain containers; never runs what the file says. allowed: classes that may be in it
    besides, which have to be harmless whatever their attributes are. CheckpointError names it."""
    size = file_size(path)
    with refusing(path, "is damaged, or holds more than tensors"), torch.serialization.safe_globals(list(allowed)):
        if zipfile.is_zipfile(path):
            # torch.save compresses nothing; a zip that unpacks to more than itself is made to fill the memory.
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > size:
                    raise ValueError("its contents are larger than the file")
            return torch.load(path, map_location=device, weights_only=True, mmap=False)
        with _Within(path, size) as file:
            return torch.load(file, map_location=device, weights_only=True)


class _Within(io.BufferedReader):
    """A file that is asked for more than it has (a string of 2 GiB, says a pickle of 9 bytes) without taking memory for
    the rest."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(io.FileIO(path))
        self._size = size

    def read(self, count: int | None = -1, /) -> bytes:
        left = max(0, self._size - self.tell())
        return super().read(left if count is None or count < 0 else min(count, left))


def some(names: list[str]) -> str:
    shown = ", ".join(name if len(name) <= 100 else name[:97] + "..." for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
