"""A bar that counts finished images, for people who wait."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def image_bar(total: int, show: bool | None) -> Iterator[Callable[[int], object]]:
    """A function that moves a bar of `total` images on. show: None = only if a person is watching stderr."""
    if show is None:
        show = sys.stderr.isatty()
    with tqdm(total=total, unit="image", disable=not show, leave=False) as bar:
        yield bar.update
