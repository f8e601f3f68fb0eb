"""Pictures as files: what strangers upload, and what is sent to them."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, PngImagePlugin

from fastigpt.image_files import from_bytes
from fastigpt.server.errors import ApiError

Format = Literal["png", "webp", "jpeg"]
UPLOADS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Encoding:
    """scale: each pixel becomes this many, squared. compression: 0 … 100, of webp and jpeg."""

    scale: int = 1
    format: Format = "png"
    compression: int = 100


def encode(pixels: np.ndarray, how: Encoding, facts: dict[str, str]) -> bytes:
    """The file of a picture, uint8 [H, W, 3]. Without loss in png, and in webp at compression 100. facts: what a png
    tells of itself."""
    picture = Image.fromarray(pixels.repeat(how.scale, 0).repeat(how.scale, 1))
    file = BytesIO()
    if how.format == "png":
        text = PngImagePlugin.PngInfo()
        for key, value in facts.items():
            text.add_text(key, value)
        picture.save(file, "PNG", pnginfo=text)
    elif how.format == "webp":
        picture.save(file, "WEBP", quality=how.compression, lossless=how.compression == 100)
    else:
        # Pixels are squares here: colour at half the resolution would smear them. 0 would mean Pillow's default.
        picture.save(file, "JPEG", quality=max(1, how.compression), subsampling=0)
    return file.getvalue()


def read_upload(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """An upright picture, RGB or RGBA. Raises ApiError for anything that is none, or has too many pixels."""
    try:
        return from_bytes(data, name, formats=UPLOADS, max_pixels=max_pixels)
    except ValueError as error:
        raise ApiError(400, f"{error}.", param=name, code="invalid_image") from None


def read_mask(data: bytes, max_pixels: int) -> np.ndarray:
    """bool [H, W], True = draw anew: where the mask has alpha 0. Raises ApiError."""
    try:
        mask = from_bytes(data, "mask", formats=("PNG",), max_pixels=max_pixels)
        if mask.mode != "RGBA":
            raise ValueError("mask has no alpha channel: what is transparent in it is drawn anew")
    except ValueError as error:
        raise ApiError(400, f"{error}.", param="mask", code="invalid_image") from None
    return np.asarray(mask.getchannel("A")) == 0


def from_data_url(url: str, name: str) -> bytes:
    """The content of a data URL. Nothing is ever fetched: ApiError for any other URL."""
    if url[:5].lower() != "data:":
        message = f"{name} must be a data URL (data:image/png;base64,…): this server fetches nothing."
        raise ApiError(400, message, param=name, code="invalid_image_url")
    head, comma, body = url.partition(",")
    try:
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError
        return base64.b64decode(body.encode("ascii"), validate=True)
    except (ValueError, binascii.Error):
        raise ApiError(400, f"{name} is no data URL in base64.", param=name, code="invalid_image_url") from None
