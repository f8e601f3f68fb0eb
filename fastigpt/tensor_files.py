"""The weights of a checkpoint directory: safetensors or pickles, whole or sharded, as tensors that are read when asked.

Files are untrusted. Nothing is allocated that a file only promises: safetensors are mapped and copied tensor by tensor
once their shape is known to be right, pickles may hold no more than their own length.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open

from fastigpt.errors import CheckpointError
from fastigpt.untrusted import exists, file_size, read_json, refusing, short

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX = ".index.json"

Held = TypeVar("Held")
Stored = dict[str, Callable[[], torch.Tensor]]
"""By the names of the file: a function that gives the tensor, which may share memory with the file or with others."""


def open_weights(folder: Path, path_of: Callable[[str], Path]) -> tuple[Path, Stored]:
    """The file that names the weights, and the tensors. path_of: where in the directory a file of a name lies."""
    return open_with({SAFETENSORS: _open_safetensors, PICKLE: _open_pickle}, folder, path_of)


def open_with(
    readers: Mapping[str, Callable[[Path], dict[str, Held]]], folder: Path, path_of: Callable[[str], Path]
) -> tuple[Path, dict[str, Held]]:
    """The same of whatever these readers make of a file: by the name of the whole file, the best first."""
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


def _open_safetensors(path: Path) -> Stored:
    file_size(path)
    with refusing(path, "is damaged or no safetensors file"):
        file = safe_open(path, framework="pt", device="cpu")

        def reader(name: str) -> Callable[[], torch.Tensor]:
            def read() -> torch.Tensor:
                with refusing(path, "is damaged or no safetensors file"):
                    return file.get_tensor(name)

            return read

        return {name: reader(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)


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


def _open_pickle(path: Path) -> Stored:
    data = load_pickle(path)
    if not isinstance(data, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in data.items()
    ):
        raise CheckpointError(f"{path} must hold a dictionary from names to tensors")
    return in_memory(data)


def in_memory(tensors: Mapping[str, torch.Tensor]) -> Stored:
    def reader(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: tensor

    return {name: reader(tensor) for name, tensor in tensors.items()}


def some(names: list[str]) -> str:
    shown = ", ".join(name if len(name) <= 100 else name[:97] + "..." for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
