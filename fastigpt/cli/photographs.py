"""The photographs that `fastigpt complete` was given, read one after another: what is kept of each is its canvas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fastigpt.images import read_image, transparent_cells
from fastigpt.model import Model


class Photographs:
    """tokens: int64 [n, h·w], the photographs as the model sees them. unfinished: the same with −1 for what to draw.
    Raises ValueError for files that are no images, and as `Model.known_cells`."""

    def __init__(self, model: Model, paths: Sequence[Path], rows: int | None, mask: Path | None) -> None:
        self._model = model
        drawn_mask = None if mask is None else read_image(mask)
        tokens, known = [], []
        for path in paths:
            picture = read_image(path)
            tokens.append(model.encode(picture))
            holes = transparent_cells(picture, *model.image_size)
            if rows is None and drawn_mask is None and (holes is None or not holes.any()):
                known.append(torch.ones_like(tokens[-1], dtype=torch.bool))
            else:
                known.append(model.known_cells(picture, rows=rows, mask=drawn_mask))
        self.tokens, kept = torch.cat(tokens), torch.cat(known)
        if rows is None and drawn_mask is None and bool(kept.all()):
            model.known_cells(picture)  # raises, and says what to do about it
        self.unfinished = self.tokens.masked_fill(~kept, -1)

    def beside_results(self, n: int) -> Callable[[range, torch.Tensor], np.ndarray]:
        """A function of some results and their tokens: uint8 [m, H, W, 3], with two pictures in front of the n results
        of a photograph: itself as the model sees it, and what was kept of it, the rest grey."""

        def show(results: range, tokens: torch.Tensor) -> np.ndarray:
            shown: list[np.ndarray] = []
            for k, pixels in zip(results, self._model.decode(tokens)):
                if k % n == 0:
                    shown += self._original(k // n)
                shown.append(pixels)
            return np.stack(shown)

        return show

    def _original(self, i: int) -> list[np.ndarray]:
        return [*self._model.decode(self.tokens[i : i + 1]), *self._model.preview(self.unfinished[i : i + 1])]
