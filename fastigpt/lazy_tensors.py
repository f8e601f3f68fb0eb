"""Weights that stay in their files: each tensor is read when it is asked for, so that a model's are in memory once, as
its engine has them.

safetensors and pickles in torch's zip format say where in the file the bytes of a tensor lie, so that single rows can
be read as well; older pickles are read whole. Files stay open, so that what replaces one on the disk changes nothing;
what is written into one is refused.
"""

from __future__ import annotations

import math
import os
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastigpt.errors import CheckpointError
from fastigpt.tensor_files import PICKLE, SAFETENSORS, load_pickle, open_with
from fastigpt.tensors import RowReader
from fastigpt.untrusted import file_size, parse_json, refusing, short

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LAZY = "a lazily negated or conjugated view"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. shape, dtype: as the file says; dtype None: of none that torch has, or no plain tensor. read:
    gives it, possibly in memory that it shares with others. Raises CheckpointError. odd: what it is instead of a plain
    dense tensor, in words that follow "is". whole: every number is stored, none repeated by a stride of 0. row: reads
    one row, where the rows of a tensor lie in the file one after the other."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], torch.Tensor]
    odd: str | None = None
    whole: bool = True
    row: RowReader | None = None


Held = dict[str, Stored]


def open_weights(folder: Path, path_of: Callable[[str], Path]) -> tuple[Path, Held]:
    """The file that names the weights of a directory, and its tensors. path_of: where in it a file of a name lies."""
    return open_with({SAFETENSORS: open_safetensors, PICKLE: _open_weights_pickle}, folder, path_of)


def named(data: object, source: Path) -> Held:
    """What open_pickle found, which must be a dictionary from names to tensors."""
    if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(v, Stored) for k, v in data.items()):
        raise CheckpointError(f"{source} must hold a dictionary from names to tensors")
    return data


def in_memory(tensors: Mapping[str, torch.Tensor]) -> Held:
    """Lazily negated and conjugated views are worked out."""
    found = {name: _in_memory(tensor) for name, tensor in tensors.items()}
    lazy = {name for name, stored in found.items() if stored.odd == _LAZY}
    return found | {name: _in_memory(tensors[name].resolve_neg().resolve_conj()) for name in lazy}


def _in_memory(tensor: torch.Tensor) -> Stored:
    if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
        return Stored((), None, lambda: tensor, odd="on the meta device, without values")
    return _described(tensor)


def _described(tensor: torch.Tensor, read: Callable[[], torch.Tensor] | None = None) -> Stored:
    """By a tensor with or without values; read None: it is what is read."""
    odd = None
    if read is None:
        read = lambda: tensor  # noqa: E731
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        odd = f"a {type(tensor).__name__}"
    elif tensor.is_nested:
        odd = "a nested tensor"
    elif tensor.layout != torch.strided:
        odd = f"of layout {str(tensor.layout).removeprefix('torch.')}"
    elif tensor.is_quantized:
        odd = "quantised"
    elif tensor.is_neg() or tensor.is_conj():
        odd = _LAZY
    if odd is not None:
        return Stored((), None, read, odd)
    return Stored(tuple(tensor.shape), tensor.dtype, read, whole=tensor.untyped_storage().nbytes() >= tensor.nbytes)


class _OpenFile:
    """A file that stays the one that was opened, whatever takes its name. Any thread and any forked child may read."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, file_size(path)
        with refusing(path, "cannot be read"):
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (open as long as what it holds is used)
        self._lock = threading.Lock()
        self._opened = self._stamp()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def read(self, offset: int, size: int) -> torch.Tensor:
        """uint8 [size] in memory of its own."""
        if not (offset >= 0 and 0 <= size <= self.size - offset):
            raise CheckpointError(f"{self.path} is damaged: it ends before its tensors do")
        found = torch.empty(size, dtype=torch.uint8, device="cpu")
        left = found.numpy().data
        with refusing(self.path, "cannot be read"):
            while len(left) > 0:
                count = self._into(left, offset)
                if count <= 0:
                    break
                left, offset = left[count:], offset + count
        if len(left) > 0 or self._stamp() != self._opened:
            raise CheckpointError(f"{self.path} has changed since it was opened: load it anew")
        return found

    def _into(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:  # Windows
            self._file.seek(offset)
            return self._file.readinto(view) or 0


def open_safetensors(path: Path) -> Held:
    """Readers of the tensors of a safetensors file, which was checked as a whole."""
    file = _OpenFile(path)
    with refusing(path, "is damaged or no safetensors file"):
        with safe_open(path, framework="pt", device="cpu") as checked:
            checked.keys()
        (length,) = struct.unpack("<Q", file.read(0, 8).numpy().tobytes())
        header = parse_json(file.read(8, length).numpy().tobytes(), str(path))
        found = {name: _of_header(file, 8 + length, name, told) for name, told in header.items() if name[:2] != "__"}
    return found


def _of_header(file: _OpenFile, start: int, name: str, told: Mapping[str, Any]) -> Stored:
    shape, dtype = tuple(int(n) for n in told["shape"]), _DTYPES.get(str(told["dtype"]))
    begin, end = (int(n) for n in told["data_offsets"])

    def read() -> torch.Tensor:
        if dtype is None:
            raise CheckpointError(f"{file.path}: {name} holds {short(told['dtype'])}, which is no dtype of torch")
        with refusing(file.path, "is damaged or no safetensors file"):
            return file.read(start + begin, end - begin).view(dtype).view(shape)

    return Stored(shape, dtype, read, row=_row_reader(file, start + begin, shape, dtype))


def _row_reader(file: _OpenFile, offset: int, shape: tuple[int, ...], dtype: torch.dtype | None) -> RowReader | None:
    """offset: where in the file the first row begins."""
    if dtype is None or len(shape) < 2:
        return None
    rows, rest = shape[0], shape[1:]
    size = math.prod(rest) * dtype.itemsize

    def read(row: int) -> torch.Tensor:
        if not 0 <= row < rows:
            raise IndexError(f"row {row} of {rows}")
        return file.read(offset + row * size, size).view(dtype).view(rest)

    return read


def _open_weights_pickle(path: Path) -> Held:
    return named(open_pickle(path), path)


def open_pickle(path: Path, allowed: Sequence[type] = ()) -> object:
    """What a pickle holds (see load_pickle), with a `Stored` in the place of every tensor of its dictionaries."""
    file = _OpenFile(path)
    if _in_place(path):
        # Tensors without memory, whose storages know their places in the file; in older versions of torch they do not.
        try:
            data = load_pickle(path, "meta", allowed)
        except (
            CheckpointError
        ):  # some kinds of tensors cannot be without memory: what they are is told once they are read
            pass
        else:
            if any(_place(tensor) is not None for tensor in _tensors(data)):
                return _stored(data, file)
    return _stored(load_pickle(path, allowed=allowed), None)


def _in_place(path: Path) -> bool:
    """Whether the tensors of a pickle lie in it as they do in memory."""
    file_size(path)
    with refusing(path, "is damaged, or holds more than tensors"):
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            order = next((entry for entry in entries if entry.filename.endswith("/byteorder")), None)
            native = order is not None and order.file_size < 9 and archive.read(order) == b"little"
        return native and all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _stored(data: object, file: _OpenFile | None) -> object:
    """file: in which the tensors lie; None: they are in memory."""
    if isinstance(data, dict):
        return {name: _stored(value, file) for name, value in data.items()}
    if not isinstance(data, torch.Tensor):
        return data
    return _in_memory(data) if file is None else _of_meta(file, data)


def _of_meta(file: _OpenFile, empty: torch.Tensor) -> Stored:
    offset = _place(empty)
    if offset is None:
        stored = _described(empty, lambda: _refuse(file))
        return stored if stored.odd else replace(_in_memory(empty), read=stored.read)
    size, shape, strides, first, dtype = (
        empty.untyped_storage().nbytes(), tuple(empty.shape), empty.stride(), int(empty.storage_offset()), empty.dtype
    )  # fmt: skip

    def read() -> torch.Tensor:
        with refusing(file.path, "is damaged"):
            return torch.as_strided(file.read(offset, size).view(dtype), shape, strides, first)

    described = _described(empty, read)
    if described.odd is None and empty.is_contiguous():
        return replace(described, row=_row_reader(file, offset + first * dtype.itemsize, shape, dtype))
    return described


def _tensors(data: object) -> Iterator[torch.Tensor]:
    if isinstance(data, torch.Tensor):
        yield data
    for value in data.values() if isinstance(data, dict) else ():
        yield from _tensors(value)


def _place(empty: torch.Tensor) -> int | None:
    """Where in its file the storage of a tensor begins; None for one that is not plain, or has no values there."""
    plain = not (empty.is_nested or empty.is_quantized or empty.is_neg() or empty.is_conj())
    if not plain or empty.layout != torch.strided:
        return None
    return getattr(empty.untyped_storage(), "_checkpoint_offset", None)


def _refuse(file: _OpenFile) -> torch.Tensor:
    raise CheckpointError(f"{file.path} holds a tensor that is not plain and dense")
