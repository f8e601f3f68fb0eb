"""What happens to an image of any size before a codec sees its pixels."""

from __future__ import annotations

from dataclasses import dataclass

BILINEAR = 2
"""Pillow's number of the filter."""


@dataclass(frozen=True)
class Preprocessing:
    """resample: Pillow's number of the filter. do_resize: False where images have to come at the codec's size.
    refused: what a checkpoint asks for that cannot be done, so that images are refused and tokens are not; None:
    nothing."""

    resample: int = BILINEAR
    do_resize: bool = True
    refused: str | None = None
