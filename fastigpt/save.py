"""How a checkpoint directory is written over: whoever reads it, whenever the writer dies, finds the old one or the new.

A new checkpoint is written whole into a folder inside the directory; renaming that folder to NEW is the moment at which
it counts. Then its files are moved out, config.json last. Readers look into NEW first, so for them nothing is ever
mixed, and readers that know nothing of NEW find no config.json while the files are moved. A save that finds a NEW left
by one that died moves those files before it begins.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from fastigpt.files import umask
from fastigpt.untrusted import exists, read_json

NEW = ".fastigpt-new"
_WRITING = ".fastigpt-writing"
_MANIFEST = "files.json"
_LAST = "config.json"
Stamp = tuple[tuple[object, ...], ...]


class CheckpointFiles:
    """Where the files of a checkpoint directory are. belongs: the names a save writes or removes."""

    def __init__(self, folder: Path, belongs: frozenset[str]) -> None:
        self.folder, self._belongs = folder, belongs
        self._written: set[str] | None = None
        if exists(folder / NEW / _MANIFEST):
            names = read_json(folder / NEW / _MANIFEST)
            self._written = {str(name) for name in names} if isinstance(names, list) else set()

    def path(self, name: str) -> Path:
        """Of a file that may or may not be there."""
        if self._written is None or name not in self._belongs:
            return self.folder / name
        if name not in self._written or exists(self.folder / NEW / name):
            return self.folder / NEW / name
        return self.folder / name

    def stamp(self, patterns: Sequence[str]) -> Stamp:
        """Differs when a file of such a name has been written, moved or removed since."""
        found = []
        for folder in (self.folder, self.folder / NEW):
            with suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    if any(fnmatch(entry.name, pattern) for pattern in (*patterns, _MANIFEST)):
                        with suppress(OSError):
                            at = entry.stat()
                            numbers = at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns
                            found.append((os.path.abspath(entry.path), *numbers))
        return tuple(sorted(found))


def replace(folder: str | os.PathLike[str], write: Callable[[Path], None], belongs: frozenset[str]) -> None:
    """Calls write(temporary folder) and makes what it wrote the directory's checkpoint. Files whose names are in
    `belongs` and that were not written are removed; all others stay. If `write` fails nothing has changed."""
    target = Path(folder)
    if exists(target) and not target.is_dir():
        raise NotADirectoryError(f"cannot write the folder {target}: a file of that name exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            write(temporary)
            _open_to_others(temporary)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return
    with _locked(target):
        _finish(target, belongs)
        for name in belongs:
            if (target / name).is_dir() and not (target / name).is_symlink():
                raise IsADirectoryError(f"cannot write {target / name}: it is a folder")
        temporary = target / _WRITING
        _remove(temporary)  # of a save that died; nobody else writes now
        try:
            temporary.mkdir()
            write(temporary)
            _open_to_others(temporary)
            names = sorted(path.name for path in temporary.iterdir())
            (temporary / _MANIFEST).write_text(json.dumps(names))
            os.replace(temporary, target / NEW)
        finally:
            _remove(temporary)
        _finish(target, belongs)


def _finish(target: Path, belongs: frozenset[str]) -> None:
    """Moves the files of NEW, if there is one, to where they belong."""
    new = target / NEW
    if not exists(new / _MANIFEST):
        _remove(new)
        return
    written = [name for name in CheckpointFiles(target, belongs)._written or () if name in belongs]
    if exists(new / _LAST):
        (target / _LAST).unlink(missing_ok=True)
    for name in belongs.difference(written):
        (target / name).unlink(missing_ok=True)
    for name in sorted(written, key=lambda name: (name == _LAST, name)):
        if exists(new / name):
            os.replace(new / name, target / name)
    shutil.rmtree(new)


def _remove(path: Path) -> None:
    """A folder with all that is in it, or whatever else somebody has put there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One save at a time in one directory; a process that dies lets go."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _open_to_others(folder: Path) -> None:
    """mkdtemp's folders and safetensors' files are private."""
    folder.chmod(0o777 & ~umask())
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask())
