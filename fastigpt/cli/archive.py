"""Images as an array in an .npz file, arr_0 uint8 [n, height, width, 3], written as they are finished.

Until the end they are in NAME.npz.partial beside it, an .npy file that is whole after every batch: should the process
be killed, `numpy.load` reads from it what was finished.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fastigpt.cli.output import Output, check_format, check_room
from fastigpt.files import check_writable, replacing

if TYPE_CHECKING:
    import numpy as np


class Archive(Output):
    """path: None = standard output."""

    def __init__(self, name: str, path: Path | None) -> None:
        super().__init__(name)
        self._path = path
        self._partial = None if path is None else path.with_name(path.name + ".partial")
        self._file: BinaryIO | None = None
        if path is None or self._partial is None:
            return
        check_writable(path)
        if self._partial.exists():
            raise ValueError(
                f"--out {name}: {self._partial} holds images of a job that was killed (numpy.load reads it); "
                "move or delete it first"
            )

    def expect(self, count: int, height: int, width: int) -> None:
        folder = Path(tempfile.gettempdir()) if self._path is None else self._path.parent
        check_room(folder, count * height * width * 3, self.name)

    def check_signable(self) -> None:
        check_format(self.name, ".npz")

    def _take(self, pixels: np.ndarray) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile() if self._partial is None else self._partial.open("x+b")  # noqa: SIM115
            _header(self._file, (0, *pixels.shape[1:]))
        self._file.seek(0, 2)
        self._file.write(pixels.tobytes())
        self._file.flush()
        _header(self._file, (self.count + len(pixels), *pixels.shape[1:]))

    def close(self) -> None:
        if self._file is None:
            return
        if self._path is None:
            _pack(self._file, sys.stdout.buffer)
        else:
            with replacing(self._path) as path, path.open("wb") as packed:
                _pack(self._file, packed)
        self._file.close()
        if self._partial is not None:
            self._partial.unlink()


def _header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Writes the header of an .npy file; numpy leaves room in it for a first axis that grows."""
    import numpy as np

    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    file.flush()


def _pack(array: BinaryIO, to: BinaryIO) -> None:
    """As numpy.savez_compressed does, without holding the array."""
    array.seek(0)
    with (
        zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        shutil.copyfileobj(array, member)
