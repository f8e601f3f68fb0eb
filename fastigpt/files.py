"""Writes files so that a reader never sees half of one: written beside, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path beside `path` to write to; renamed to `path` if the block succeeds, removed if it fails.

    Raises OSError naming `path` before the block runs if its folder is missing or cannot be written.
    """
    target = Path(path)
    check_writable(target)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask())  # mkstemp's files are private
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises OSError naming `path` unless a file can be created there. Called before long work, not after it."""
    target = Path(path)
    folder = target.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {target}: folder {folder} does not exist")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {target}: no permission to write in {folder}")


def check_folder_writable(path: str | os.PathLike[str]) -> None:
    """Raises OSError naming `path` unless it is a folder to write in, or can be made as one. Makes nothing."""
    target = Path(path)
    nearest = next(p for p in (target, *target.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"cannot write the folder {target}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write the folder {target}: no permission to write in {nearest}")


def write_folder(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Calls write(folder) on a temporary folder and moves what it wrote to `path`, file by file if that exists."""
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"cannot write the folder {target}: a file of that name exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        write(temporary)
        temporary.chmod(0o777 & ~umask())
        for file in temporary.iterdir():
            file.chmod(0o666 & ~umask())  # safetensors makes its files private
        if not target.exists():
            os.replace(temporary, target)
            return
        for file in sorted(temporary.iterdir()):
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
