"""The images of a complete job, in order, a few at a time: what all exports read. A job that is not complete, or a
shard that is not what the manifest says, is refused."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.records import Damaged

if TYPE_CHECKING:
    import numpy as np

_DECODED = 64  # images decoded at a time


@dataclass(frozen=True)
class Picture:
    """index: the image index. pixels: uint8 [H, W, 3]. prompt: what the image read, None without one."""

    index: int
    pixels: np.ndarray
    prompt: str | None


class Images:
    """model, device: where the checkpoint lies and what decodes; None: where the job has it from, and what is there.

    n; height, width: in pixels. Raises ValueError if the job is not complete, or the model is another one."""

    def __init__(self, job: JobDirectory, model: str | None = None, device: str | None = None) -> None:
        manifest = job.manifest()
        if manifest is None:
            done = job.done(job.committed())
            raise ValueError(
                f"{job.store.name} is not complete: {done:,} of {job.parameters.n:,} images are drawn, or not yet read "
                f"and found right; fastigpt job run {job.store.name} goes on"
            )
        from fastigpt.jobs.drawing import load_model

        self.job, self.n = job, job.parameters.n
        self._manifest, self._model = manifest, load_model(job.parameters, model, device)
        _, first = job.tokens(0)
        self.height, self.width = self._decode(first[:1]).shape[1:3]

    def __iter__(self) -> Iterator[Picture]:
        """Raises Damaged."""
        for shard, listed in enumerate(self._manifest.shards):
            record, tokens = self.job.tokens(shard)
            if listed.get("sha256") != record.sha256:
                raise Damaged(f"{self.job.store.name}/manifest.json has shard {shard} otherwise than its record")
            for first in range(0, record.n, _DECODED):
                for row, pixels in enumerate(self._decode(tokens[first : first + _DECODED]), first):
                    index = record.first + row
                    yield Picture(index, pixels, self.job.prompt(index))

    def _decode(self, tokens: np.ndarray) -> np.ndarray:
        return self._model.decode(tokens.astype("int64"))

    def facts(self, picture: Picture) -> dict[str, str]:
        """What a PNG tells of how it was drawn, as those of `fastigpt sample` do."""
        p = self.job.parameters
        facts = {"model": self._model.name, "seed": str(p.seed), "index": str(picture.index)}
        return facts if picture.prompt is None else {**facts, "prompt": picture.prompt}

    def png(self, picture: Picture) -> bytes:
        from PIL import Image, PngImagePlugin

        text, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
        for key, value in self.facts(picture).items():
            text.add_itxt(key, value) if not value.isascii() else text.add_text(key, value)
        Image.fromarray(picture.pixels).save(buffer, format="PNG", pnginfo=text)
        return buffer.getvalue()


def file_name(picture: Picture) -> str:
    """Without suffix; names sort as indices do."""
    return f"{picture.index:08d}"
