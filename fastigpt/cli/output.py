"""Where images are written: a grid in one picture, an .npz array, a folder; or standard output.

All take images as they are finished. What was taken is safe: `close` can be called at any time, also after an
interruption, and leaves what there is by then, whole.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fastigpt.cli.options import given
from fastigpt.files import check_folder_writable, check_writable, replacing

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# Pixels on a side that a format can hold.
_SIDE = {".jpg": 65_535, ".jpeg": 65_535, ".webp": 16_383, ".gif": 65_535}


class Output(ABC):
    """facts: what a PNG tells of how it was drawn; set before the first image is added."""

    facts: dict[str, str]

    def __init__(self, name: str) -> None:
        self.name, self.facts, self.count = name, {}, 0

    @abstractmethod
    def expect(self, count: int, height: int, width: int) -> None:
        """So many images of this size will come. Raises ValueError or OSError, before any work, if they cannot."""

    @abstractmethod
    def _take(self, pixels: np.ndarray) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Finishes what was added so far. An output that holds no image leaves nothing."""

    def add(self, pixels: np.ndarray) -> None:
        """uint8 [m, height, width, 3]: the next images."""
        self._take(pixels)
        self.count += len(pixels)


def output(out: str, *, scale: int, columns: int | None = None) -> Output:
    """What --out names. Raises ValueError or OSError now, not after the work, if it cannot be written."""
    from fastigpt.cli.archive import Archive

    path = Path(given("--out", out))
    suffix = path.suffix.lower()
    to_stdout = path.stem == "-" and (suffix in (".npz", ".png") or out == "-")
    if to_stdout:
        if sys.stdout.isatty():
            raise ValueError(f"--out {out} writes bytes to standard output, which is a terminal: redirect it")
        return Archive(out, None) if suffix == ".npz" else Grid(out, None, scale, columns)
    if out.endswith(("/", os.sep)) or path.is_dir():
        return Folder(out, path)
    if suffix == ".npz":
        return Archive(out, path)
    if suffix in PICTURES:
        return Grid(out, path, scale, columns)
    if suffix:
        raise ValueError(f"--out {out}: write a picture (.png, .jpg, …), an array (.npz) or a folder (no suffix)")
    return Folder(out, path)


class Grid(Output):
    """One picture of all images. path: None = PNG on standard output."""

    def __init__(self, name: str, path: Path | None, scale: int, columns: int | None) -> None:
        super().__init__(name)
        self._path, self._scale, self._columns = path, scale, columns
        self._images: list[np.ndarray] = []
        if path is not None:
            check_writable(path)

    def expect(self, count: int, height: int, width: int) -> None:
        from fastigpt.images import GridLayout

        try:
            layout = GridLayout.of(count, height, width, self._columns, self._scale)
            suffix = ".png" if self._path is None else self._path.suffix.lower()
            if max(layout.height, layout.width) > _SIDE.get(suffix, 2**31 - 1):
                raise ValueError(
                    f"a grid of {count} images is {layout.width} × {layout.height} pixels at scale {self._scale}; "
                    f"{suffix} holds at most {_SIDE[suffix]} on a side"
                )
        except ValueError as error:
            raise ValueError(f"--out {self.name}: {error}. Name a folder or an .npz, or lower --scale") from None

    def _take(self, pixels: np.ndarray) -> None:
        self._images.append(pixels)

    def close(self) -> None:
        import numpy as np

        from fastigpt.images import grid

        if not self._images:
            return
        picture = grid(np.concatenate(self._images), self._columns, scale=self._scale)
        if self._path is None:
            save_picture(picture, sys.stdout.buffer, ".png", self.facts)
            return
        with replacing(self._path) as path:
            save_picture(picture, path, path.suffix, self.facts)


class Folder(Output):
    """A file for each image, 00000.png, 00001.png, …, written as it is finished."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name)
        self._path, self._digits = path, 5
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {name}: a file of that name exists, and no suffix means a folder")
        check_folder_writable(path)
        if path.is_dir():
            found = sum(file.suffix.lower() in PICTURES for file in path.iterdir())
            if found:
                raise ValueError(
                    f"--out {name}: the folder holds {found} picture{'s' if found > 1 else ''} already, and two jobs "
                    "are not mixed; name another folder, or empty this one"
                )

    def expect(self, count: int, height: int, width: int) -> None:
        check_room(self._path, 4096 * count, self.name)  # a block of the file system for each
        self._digits = max(5, len(str(count - 1)))

    def _take(self, pixels: np.ndarray) -> None:
        from PIL import Image

        self._path.mkdir(parents=True, exist_ok=True)
        first = int(self.facts.get("first_index", 0))
        for i, image in enumerate(pixels, self.count):
            facts = {**self.facts, "index": str(first + i)}
            with replacing(self._path / f"{i:0{self._digits}d}.png") as path:
                save_picture(Image.fromarray(image), path, ".png", facts)

    def close(self) -> None:
        pass


def save_picture(picture: Image.Image, to: Path | BinaryIO, suffix: str, facts: dict[str, str]) -> None:
    """Only a .png can tell the facts."""
    from PIL import Image, PngImagePlugin

    if suffix.lower() != ".png":
        picture.save(to)
        return
    text = PngImagePlugin.PngInfo()
    for key, value in facts.items():
        text.add_text(key, value)
    assert isinstance(picture, Image.Image)
    picture.save(to, format="PNG", pnginfo=text)


def check_picture(option: str, path: str) -> Path:
    """The path of a picture that can be written. Raises ValueError or OSError otherwise."""
    found = Path(given(option, path))
    if found.suffix.lower() not in PICTURES:
        raise ValueError(f"{option} {path}: name a picture (.png, .jpg, …)")
    check_writable(found)
    return found


def check_room(path: Path, size: int, name: str) -> None:
    """Raises ValueError if the disk has fewer than `size` bytes free."""
    import shutil

    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(nearest).free
    if size > free:
        raise ValueError(f"--out {name}: needs about {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there")
