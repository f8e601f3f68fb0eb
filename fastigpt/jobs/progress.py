"""A bar over the images of a directory, whoever draws them, moved by a thread that looks now and then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.store import Store
from fastigpt.progress import LOG_SECONDS, image_bar


class Rows:
    """Counts rows of images that this process is drawing, for the bar to show its share of them."""

    def __init__(self) -> None:
        self.finished = 0

    def add(self, images: int) -> None:
        self.finished += images


@contextmanager
def watching(store: Store, rows: Rows, show: bool | None) -> Iterator[None]:
    """Shows a bar while the block runs, as soon as there is a job in the store. show: as for image_bar; None: also a
    line a minute where nobody watches, as a job is nothing that one waits for."""
    over = threading.Event()

    def watch() -> None:
        with suppress(OSError, ValueError):  # whoever draws finds the same, and tells
            while (job := JobDirectory.find(store)) is None:
                if over.wait(store.poll):
                    return
            n, height = job.parameters.n, job.parameters.height
            done = job.done(job.committed())
            with image_bar(n, True if show is None else show, height, done=done, log_after=LOG_SECONDS) as bar:
                drawn = rows.finished
                while not over.wait(store.poll):
                    now = job.done(job.committed())
                    if now > done:
                        done, drawn = now, rows.finished
                    bar.images(min(n, done + (rows.finished - drawn) // height))
                bar.images(job.done(job.committed()))

    if show is False:
        yield
        return
    thread = threading.Thread(target=watch, name="fastigpt.progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
