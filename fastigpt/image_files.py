"""The one reader of image files, and of PIL images: whatever is in them becomes what a person sees in a viewer,
upright, with 8 bits a channel, in mode RGB, or RGBA where something is transparent.

Colour profiles are not applied, as in transformers' processors.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image

from fastigpt.image_arrays import MAX_PIXELS, check_size, levels

_UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_LOW_BIT_STEPS = {"L;2": 85, "L;4": 17}  # what Pillow multiplies grey levels of 2 and 4 bits by, but not their tRNS


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """The first frame or page of an image file, in mode RGB or RGBA, turned upright by its EXIF orientation.

    16-bit grey is scaled to 8 bits, floats in [0, 1] are, and 32-bit integers by their range (see `from_pil`). Raises
    ValueError that names the file: it is missing, no image, damaged, or has more than MAX_PIXELS pixels, which is found
    out before anything is decoded.
    """
    try:
        file = Path(path)
        if not file.is_file():
            raise ValueError("it is a folder" if file.is_dir() else "there is no such file")
        with file.open("rb") as stream:
            return _rgb(_open(stream))
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise ValueError(f"cannot read the image {os.fspath(path)}: {_reason(error)}") from None


def from_bytes(data: bytes, name: str, *, formats: Sequence[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """As `read_image`, of a file's content, if it is in one of these formats of Pillow's, whatever else it calls
    itself. Raises ValueError that names `name`, before anything is decoded if the image has more than max_pixels."""
    try:
        picture = _open(BytesIO(data), formats)
        check_size(*picture.size, max_pixels)
        return _rgb(picture)
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise ValueError(f"{name} cannot be read as {' or '.join(formats)}: {_reason(error)}") from None


def mime_type(data: bytes) -> str:
    """Of an image file, by its content; nothing is decoded. Raises ValueError for what is in no format that Pillow
    knows."""
    try:
        with _open(BytesIO(data)) as image:
            return Image.MIME.get(image.format or "", "application/octet-stream")
    except Exception as error:  # readers of headers raise whatever a damaged file leads them to
        raise ValueError(f"it cannot be read: {_reason(error)}") from None


def from_pil(image: Image.Image, name: str) -> Image.Image:
    """A PIL image of any mode as `read_image` returns it: upright by the EXIF orientation it still carries.

    Modes "I;16…" are 16 bits. Mode "I" does not say its range: up to 255 it is taken for 8 bits, up to 65,535 for 16
    (in files whose format is 16 bits, always for those); values below and above are refused. Mode "F" must lie in
    [0, 1]. Raises ValueError that names the argument.
    """
    try:
        return _rgb(image)
    except Exception as error:  # an image that is still in its file is decoded here
        raise ValueError(f"{name} holds an image that cannot be read: {_reason(error)}") from None


def _open(stream: IO[bytes], formats: Sequence[str] | None = None) -> Image.Image:
    """Image.open, without its look at the global MAX_IMAGE_PIXELS, which warns and raises as the process has set it.
    formats: Pillow's names of those that are tried; None: all."""
    start = stream.read(16)
    tried: set[str] = set()
    for load_plugins in (Image.preinit, Image.init):
        load_plugins()
        for format in [known for known in Image.ID if known not in tried]:
            tried.add(format)
            if formats is not None and format not in formats:
                continue
            factory, accept = Image.OPEN[format]
            try:
                accepted = accept is None or accept(start)
                if not accepted or isinstance(accepted, str):  # a sentence says why not
                    continue
                stream.seek(0)
                return factory(stream, "")  # with a name, raw pixels would be mapped: see _load
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue  # another format
    raise ValueError(f"it is in {'no format that Pillow knows' if formats is None else 'another format'}, or damaged")


def _rgb(image: Image.Image) -> Image.Image:
    _check(image)
    step = _transparency_step(image)
    _load(image)
    _check(image)  # an icon's size is known when it has been decoded
    if step is not None:
        image = image.copy()
        image.info["transparency"] = step(image.info["transparency"])
    turn = _UPRIGHT.get(_orientation(image))  # of a TIFF none: Pillow turned it when it was loaded
    picture = _eight_bits(image)
    if turn is None:
        return picture
    picture = picture.transpose(turn)
    picture.info = {}  # or it would be turned again
    return picture


def _load(image: Image.Image) -> None:
    """Decodes an image that is still in its file, without mapping the file: Pillow turns mapped TIFFs wrongly, and a
    file that gets shorter while it is mapped kills the process."""
    name = getattr(image, "filename", None)
    if name is None:
        image.load()
        return
    try:
        vars(image)["filename"] = ""
        image.load()
    finally:
        vars(image)["filename"] = name


def _check(image: Image.Image) -> None:
    try:
        check_size(*image.size)
    except ValueError as error:
        raise ValueError(f"it has {error}") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    transparency = image.info.get("transparency")
    if image.mode == "RGBA" or (image.mode == "RGB" and transparency is None):
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        grey = Image.fromarray(_grey_levels(image, values)).convert("RGB")
        if isinstance(transparency, int):
            grey.putalpha(Image.fromarray(np.where(values == transparency, np.uint8(0), np.uint8(255))))
        return grey
    if image.mode == "La":
        image = image.convert("LA")
    opaque = transparency is None and image.mode not in ("LA", "PA", "RGBa")
    return image.convert("RGB" if opaque else "RGBA")


def _grey_levels(image: Image.Image, values: np.ndarray) -> np.ndarray:
    """uint8 of the values of an image in mode I, I;16… or F."""
    if image.mode == "F":
        return levels(values, "an image of mode F")
    low, high = int(values.min()), int(values.max())
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode != "I":
        bits = tags.get(_TIFF_BITS, (16,))[0]  # a microscope's 12 bits are not stretched to 16
    elif high > 255 or image.format in ("PPM", "PNG"):  # these are 16 bits wide there
        bits = 16
    else:
        bits = 8
    if low < 0 or high >= 1 << bits:
        raise ValueError(f"mode {image.mode!r} with values from {low} to {high}, which are neither 8 nor 16 bits")
    if image.mode != "I" and tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = (1 << bits) - 1 - values.astype(np.int32)
    return (values.astype(np.uint32) >> (bits - 8)).astype(np.uint8)


def _transparency_step(image: Image.Image) -> Any:
    """How a PNG's transparent colour becomes one of the decoded 8 bits, or None: Pillow keeps it as it is in the file.

    Of 16-bit colours the high bytes count, as in the decoded image."""
    if image.format != "PNG" or "transparency" not in image.info or not getattr(image, "tile", None):
        return None
    raw = image.tile[0].args  # type: ignore[attr-defined]
    if raw in _LOW_BIT_STEPS:
        return lambda grey: grey * _LOW_BIT_STEPS[raw]
    if raw == "RGB;16B":
        return lambda color: tuple(channel >> 8 for channel in color)
    return None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF: viewers show the picture as it is stored
        return 1


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
