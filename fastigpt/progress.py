"""A bar that counts images with a rate: in a terminal, in a notebook, and as a line now and then in a log."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOG_SECONDS = 60.0
"""Between lines of a log."""


@contextmanager
def image_bar(
    total: int, show: bool | None, height: int = 1, *, done: int = 0, log_after: float = 0.0
) -> Iterator[ImageBar]:
    """A bar of `total` images of `height` rows; `rows` and `images` move it on.

    show: None = if a person is watching (stderr is a terminal, or this is a notebook). True shows one even where nobody
    is: a line a minute, as suits a log, and none before `log_after` seconds. done: images that were there before, and
    have no part in the rate.
    """
    if not (watched() if show is None else show):
        yield ImageBar(None, height)
        return
    with _bar(total, done, log_after) as bar:
        yield ImageBar(bar, height)


class ImageBar:
    """Counts images; a row that is finished counts as its share of one."""

    def __init__(self, bar: Any, height: int) -> None:
        self._bar, self._height, self._rows = bar, height, 0
        self.shown = bar is not None

    def rows(self, images: int, row: int) -> None:
        """Row `row` of so many images is finished."""
        if self._bar is not None:
            self._rows += images
            self._bar.set_postfix_str(f"row {row + 1} of {self._height}", refresh=False)
            self._bar.update(self._rows // self._height - self._bar.n)

    def finished(self, images: int) -> None:
        """So many more images are finished, of whose rows none were reported."""
        if self._bar is not None:
            self._rows += images * self._height
            self._bar.update(self._rows // self._height - self._bar.n)

    def images(self, total: int) -> None:
        """So many images in all are finished, whatever rows of them were reported."""
        if self._bar is not None:
            self._rows = total * self._height
            self._bar.update(total - self._bar.n)


def watched() -> bool:
    """Whether a bar on stderr would be seen: it is a terminal, or IPython shows it in a notebook."""
    return sys.stderr.isatty() or in_notebook()


def in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def _bar(count: int, done: int, log_after: float) -> Any:
    if watched():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets a notebook gets the plain bar: no need to say so
            from tqdm.auto import tqdm
        return tqdm(total=count, initial=done, unit="image", miniters=0, leave=False, smoothing=0.1)
    from tqdm import tqdm as plain

    return plain(
        total=count,
        initial=done,
        unit="image",
        file=_Lines(),
        delay=log_after,
        mininterval=LOG_SECONDS,
        miniters=0,
        bar_format="{n_fmt} of {total_fmt} images, {rate_fmt}, {remaining} left{postfix}",
    )


class _Lines:
    """A file for tqdm that writes lines to stderr, not carriage returns."""

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
