"""Draws a job of any size and writes it as it goes: memory follows the batch, and what is finished is never lost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from fastigpt.signals import Interrupted, stoppable

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fastigpt.chunks import Repeated
    from fastigpt.cli.output import Output
    from fastigpt.job import Stats
    from fastigpt.model import Model

FIRST_CHUNK = 64  # images, before it is known how long one takes
LEAST_CHUNK = 16
CHUNK_SECONDS = 30.0  # between writes, about


@dataclass
class Totals:
    """What a job took, added up over its chunks. drawn, pass_starts: int64 [h, w], images in which a token was
    drawn there, and in which a pass of the model began there. batch: images drawn side by side at most."""

    seed: int
    images: int = 0
    seconds: float = 0.0
    batch: int = 1
    drawn: Any = 0
    pass_starts: Any = 0

    def add(self, stats: Stats) -> None:
        self.images += len(stats.drawn)
        self.seconds += stats.seconds
        self.batch = max(self.batch, stats.batch)
        self.drawn = self.drawn + stats.drawn.sum(0)
        self.pass_starts = self.pass_starts + stats.pass_starts.sum(0)

    @property
    def passes(self) -> float:
        """Of an image."""
        return int(self.pass_starts.sum()) / self.images

    @property
    def tokens_per_pass(self) -> float:
        return int(self.drawn.sum()) / max(1, int(self.pass_starts.sum()))

    @property
    def seconds_per_pass(self) -> float:
        """Of the images that are drawn side by side together."""
        return self.seconds * self.batch / max(1, int(self.pass_starts.sum()))


def draw(
    model: Model,
    canvases: Repeated,
    out: Output,
    *,
    seed: int,
    first_index: int,
    options: dict[str, Any],
    show: Callable[[range, torch.Tensor], np.ndarray] | None = None,
) -> Totals:
    """Fills canvases with the model and adds the images to `out`, in order.

    options: of Model.fill. show: what to add to `out` for some of the images and their tokens; None: the images.
    Ctrl-C and SIGTERM finish `out` with what is there, say how to go on, and end the program with the signal's status.
    """
    from fastigpt.options import LAST_INDEX
    from fastigpt.progress import LOG_SECONDS, image_bar
    from fastigpt.scalars import whole

    count, done, totals = len(canvases), 0, Totals(seed)
    whole("first_index", first_index, 0, LAST_INDEX - count + 1)
    batch_size = options["batch_size"]
    sizes = _chunk_sizes(None if batch_size is None else whole("batch_size", batch_size, 1))
    size = next(sizes)
    try:
        with stoppable() as signals, image_bar(count, True, model.spec.height, log_after=LOG_SECONDS) as bar:
            while done < count:
                chunk = range(done, min(done + size, count))
                tokens, stats = model.fill(
                    canvases.chunk(chunk),
                    seed=seed,
                    first_index=first_index + done,
                    on_row=None if options.get("particles", 1) > 1 else lambda some, row, _: bar.rows(len(some), row),
                    progress=False,
                    return_stats=True,
                    **options,
                )
                with signals.held():
                    out.add(model.decode(tokens) if show is None else show(chunk, tokens))
                    totals.add(stats)
                    done = chunk.stop
                bar.images(done)
                size = sizes.send(len(chunk) / stats.seconds)
    except Interrupted as stop:
        out.close()
        held = f"{out.name} holds the {done:,} images that were finished" if done else "no image was finished"
        print(
            f"interrupted: {held}; the same command with --seed {seed} --first-index {first_index + done} and another "
            f"--out goes on with the {count - done:,} others",
            file=sys.stderr,
        )
        raise typer.Exit(128 + stop.number) from None
    except BaseException:
        out.close()
        raise
    out.close()
    return totals


def _chunk_sizes(batch_size: int | None) -> Generator[int, float, None]:
    """Images of each chunk; is sent the images per second of the last one."""
    from fastigpt.chunks import MOST

    size = FIRST_CHUNK
    while True:
        whole_batches = size if batch_size is None else max(1, size // batch_size) * batch_size
        rate = yield max(1, whole_batches)
        size = min(MOST, max(LEAST_CHUNK, int(rate * CHUNK_SECONDS)))
