"""Where images are written: a grid in one picture, an .npz array, a folder; or standard output.

All take images as they are finished. What was taken is safe: `close` can be called at any time, also after an
interruption, and leaves what there is by then, whole.
"""

from __future__ import annotations

import io
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fastigpt.cli.options import given
from fastigpt.files import check_folder_writable, check_writable, replacing

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
Sign = Callable[[bytes, str, range], bytes]
"""sign(picture, format, images): the file of a picture of these images of the output, signed. format: "png", …"""

SIGNABLE = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""Suffixes of pictures that can be signed."""
# Pixels on a side that a format can hold.
_SIDE = {".jpg": 65_535, ".jpeg": 65_535, ".webp": 16_383, ".gif": 65_535}


class Output(ABC):
    """facts: what a PNG tells of how it was drawn. sign: signs every picture. Both are set before the first image is
    added; what cannot be signed says `check_signable`."""

    facts: dict[str, str]
    sign: Sign | None

    def __init__(self, name: str) -> None:
        self.name, self.facts, self.sign, self.count = name, {}, None, 0

    @abstractmethod
    def check_signable(self) -> None:
        """Raises ValueError if what is written here cannot be signed."""

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

    def _signing(self, images: range) -> Callable[[bytes, str], bytes] | None:
        """What signs a picture of these images."""
        sign = self.sign
        return None if sign is None else lambda picture, suffix: sign(picture, SIGNABLE[suffix], images)


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

    def check_signable(self) -> None:
        check_format(self.name, ".png" if self._path is None else self._path.suffix.lower())

    def _take(self, pixels: np.ndarray) -> None:
        self._images.append(pixels)

    def close(self) -> None:
        import numpy as np

        from fastigpt.images import grid

        if not self._images:
            return
        picture = grid(np.concatenate(self._images), self._columns, scale=self._scale)
        sign = self._signing(range(self.count))
        if self._path is None:
            save_picture(picture, sys.stdout.buffer, ".png", self.facts, sign)
            return
        with replacing(self._path) as path:
            save_picture(picture, path, path.suffix, self.facts, sign)


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
                save_picture(Image.fromarray(image), path, ".png", facts, self._signing(range(i, i + 1)))

    def check_signable(self) -> None:
        pass

    def close(self) -> None:
        pass


def save_picture(
    picture: Image.Image,
    to: Path | BinaryIO,
    suffix: str,
    facts: dict[str, str],
    sign: Callable[[bytes, str], bytes] | None = None,
) -> None:
    """Only a .png can tell the facts. sign: sign(file, suffix) returns the file, signed."""
    from PIL import Image, PngImagePlugin

    assert isinstance(picture, Image.Image)
    suffix = suffix.lower()
    how: dict[str, Any] = {}
    if suffix == ".png":
        text = PngImagePlugin.PngInfo()
        for key, value in facts.items():
            text.add_text(key, value)
        how = {"pnginfo": text}
    buffer = io.BytesIO()
    picture.save(buffer, Image.registered_extensions()[suffix], **how)
    data = buffer.getvalue() if sign is None else sign(buffer.getvalue(), suffix)
    if isinstance(to, Path):
        to.write_bytes(data)
    else:
        to.write(data)


def check_format(out: str, suffix: str) -> None:
    """Raises ValueError for an output of a format that cannot be signed."""
    if suffix not in SIGNABLE:
        raise ValueError(
            f"--out {out}: --c2pa signs pictures (.png, .jpg, .webp) and folders of pictures, not {suffix}"
        )


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
