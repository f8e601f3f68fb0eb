"""Where a job lies: a directory on a disk, or a URL that fsspec opens. Files appear whole or not at all.

Names have at most one folder: "job.json", "shards/000012.json".
"""

from __future__ import annotations

import errno
import itertools
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from fastigpt.owner import Owner, this_process

FOLDERS = ("shards", "claims")
_TEMPORARY = ".tmp"
_counter = itertools.count()
# What file systems without hard links answer when they are asked for one.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES, errno.EINVAL}


class Store(Protocol):
    """name: for messages. address: to open it again, from any working directory. poll: seconds between two looks at it,
    so that looking costs little."""

    name: str
    address: str
    poll: float

    def make(self) -> None:
        """Its folders exist from now on."""
        ...

    def names(self, folder: str) -> dict[str, int]:
        """The files of a folder ("" is the top) and their bytes; none if there is no such folder."""
        ...

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Writes a file, or replaces it: readers see the old one or the new."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file unless there is one; whether it did. Of several at a time one does, where the store can
        tell."""
        ...

    def remove(self, name: str) -> None:
        """If it is there."""
        ...

    def clean(self) -> None:
        """Removes what writers that are gone left half-written."""
        ...


def open_store(where: str | os.PathLike[str]) -> Store:
    """Raises TypeError for anything but a path or a URL, ValueError for a URL of an unknown kind or an empty name,
    ImportError if the package for its kind is missing."""
    name = os.fspath(where) if isinstance(where, (str, os.PathLike)) else None
    if not isinstance(name, str):
        raise TypeError(f"directory must be a path or a URL, not {type(where).__name__}")
    if not name.strip():
        raise ValueError("directory is empty: name a directory or a URL")
    protocol, separator, rest = name.partition("://")
    if not separator:
        return LocalStore(Path(name).expanduser())
    if protocol in ("file", "local"):
        return LocalStore(Path(rest))
    return UrlStore(name)


class LocalStore:
    """A directory of this machine or of a network file system. Files are synced to the disk before they get their
    names, and names before anything is written that relies on them."""

    poll = 1.0

    def __init__(self, root: Path) -> None:
        self.root, self.name, self.address = root, str(root), str(root.absolute())

    def make(self) -> None:
        if os.path.lexists(self.root) and not self.root.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a job is a directory, and this is a file", self.name)
        for folder in FOLDERS:
            (self.root / folder).mkdir(parents=True, exist_ok=True)

    def names(self, folder: str) -> dict[str, int]:
        found = {}
        with suppress(FileNotFoundError), os.scandir(self.root / folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # it may be gone by now
                    if not entry.name.startswith(".") and entry.is_file():
                        found[entry.name] = entry.stat().st_size
        return found

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def put(self, name: str, data: bytes) -> None:
        path = self.root / name
        temporary = self._written(path, data)
        try:
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)

    def create(self, name: str, data: bytes) -> bool:
        path = self.root / name
        if os.path.lexists(path):
            return False
        temporary = self._written(path, data)
        try:
            os.link(temporary, path)  # unlike a rename it does not replace
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(path):
                return False
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)
        return True

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def clean(self) -> None:
        for folder in ("", *FOLDERS):
            for path in (self.root / folder).glob(f".*{_TEMPORARY}"):
                owner = Owner.of_tag(path.name.removesuffix(_TEMPORARY).rpartition("+")[0].rpartition("+")[2])
                if owner is not None and (owner.gone() or self._old(path)):
                    path.unlink(missing_ok=True)

    def _old(self, path: Path) -> bool:
        """Whether nobody can be writing to it any more, by the clock of the file system, not by ours."""
        now = self._written(self.root / "clock", b"")
        try:
            with suppress(FileNotFoundError):
                return now.stat().st_mtime - path.stat().st_mtime > 24 * 3600
            return False
        finally:
            now.unlink(missing_ok=True)

    def _written(self, path: Path, data: bytes) -> Path:
        """A file beside `path` that holds the data, on the disk."""
        temporary = path.with_name(f".{path.name}+{this_process().tag}+{next(_counter)}{_TEMPORARY}")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # of a full disk it would not be told where
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(path)) from None
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary


def _sync(folder: Path) -> None:
    """The names in a folder, to the disk."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class UrlStore:
    """An object store or another file system of fsspec's. A put is atomic there. `create` is a conditional put where
    fsspec's `mode="create"` is one, else a look and a put: then two workers may now and then both draw a shard, and
    write the same bytes."""

    poll = 10.0

    def __init__(self, url: str) -> None:
        import fsspec

        self.name = self.address = url.rstrip("/")
        self._fs: Any
        try:
            self._fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ValueError as error:
            raise ValueError(f"{url} cannot be opened: {error}") from None
        self._path = path.rstrip("/")

    def make(self) -> None:
        self._fs.makedirs(self._path, exist_ok=True)
        for folder in FOLDERS:
            self._fs.makedirs(self._at(folder), exist_ok=True)

    def names(self, folder: str) -> dict[str, int]:
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError):
            entries = self._fs.ls(self._at(folder), detail=True)
            return {e["name"].rpartition("/")[2]: int(e["size"] or 0) for e in entries if e["type"] == "file"}
        return {}

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(self._at(name))

    def put(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(self._at(name), data)

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._fs.pipe_file(self._at(name), data, mode="create")
        except Exception:  # how a failed condition is told differs between file systems
            if self._fs.exists(self._at(name)):
                return False
            raise
        return True

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def clean(self) -> None:
        pass  # a put leaves nothing behind

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path
