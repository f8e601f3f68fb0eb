"""What a model draws: the calls that fill unknown tokens, with the types of what they return."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from PIL import Image

from fastigpt.arguments import output_kind, token_array, whole
from fastigpt.chunks import Repeated
from fastigpt.engine import loop
from fastigpt.engine.loop import OnRow
from fastigpt.filling import Fills
from fastigpt.images import as_image_list
from fastigpt.job import Stats
from fastigpt.options import DEFAULTS, CompleteOptions, DrawOptions, JobOptions
from fastigpt.signatures import takes_options
from fastigpt.streaming import RowStream


class Draws(Fills):
    """The drawing calls of Model, which has the rest."""

    @overload
    def sample(
        self,
        n: int = ...,
        *,
        output_type: Literal["pil"] = ...,
        return_stats: Literal[False] = ...,
        **options: Unpack[JobOptions],
    ) -> list[Image.Image]: ...
    @overload
    def sample(
        self,
        n: int = ...,
        *,
        output_type: Literal["pil"] = ...,
        return_stats: Literal[True],
        **options: Unpack[JobOptions],
    ) -> tuple[list[Image.Image], Stats]: ...
    @overload
    def sample(
        self,
        n: int = ...,
        *,
        output_type: Literal["np"],
        return_stats: Literal[False] = ...,
        **options: Unpack[JobOptions],
    ) -> np.ndarray: ...
    @overload
    def sample(
        self, n: int = ..., *, output_type: Literal["np"], return_stats: Literal[True], **options: Unpack[JobOptions]
    ) -> tuple[np.ndarray, Stats]: ...
    @overload
    def sample(
        self,
        n: int = ...,
        *,
        output_type: Literal["pt", "tokens"],
        return_stats: Literal[False] = ...,
        **options: Unpack[JobOptions],
    ) -> torch.Tensor: ...
    @overload
    def sample(
        self,
        n: int = ...,
        *,
        output_type: Literal["pt", "tokens"],
        return_stats: Literal[True],
        **options: Unpack[JobOptions],
    ) -> tuple[torch.Tensor, Stats]: ...
    @overload
    def sample(
        self, n: int = ..., *, output_type: str, return_stats: bool = ..., **options: Unpack[JobOptions]
    ) -> Any: ...
    @takes_options(DEFAULTS)
    def sample(
        self, n: int = 1, *, output_type: str = "pil", return_stats: bool = False, **options: Unpack[JobOptions]
    ) -> Any:
        """Draws n images.

        output_type: "pil" list of images | "np" uint8 [n, H, W, 3] | "pt" uint8 [n, 3, H, W] | "tokens" int64 [n, h·w],
        h and w being the grid's (in an Image GPT the image's). return_stats: also returns Stats. The images of a large
        job are held once, as what is returned, whatever n is; ValueError if that does not fit the memory that is free.
        """
        canvases = self._empty(whole("n", n, 1))
        return self._draw(canvases, options, output_kind(output_type), return_stats=return_stats)

    @overload
    def complete(
        self,
        images: Any,
        n: int = ...,
        *,
        output_type: Literal["pil"] = ...,
        return_stats: Literal[False] = ...,
        **options: Unpack[CompleteOptions],
    ) -> list[Image.Image]: ...
    @overload
    def complete(
        self,
        images: Any,
        n: int = ...,
        *,
        output_type: Literal["pil"] = ...,
        return_stats: Literal[True],
        **options: Unpack[CompleteOptions],
    ) -> tuple[list[Image.Image], Stats]: ...
    @overload
    def complete(
        self,
        images: Any,
        n: int = ...,
        *,
        output_type: Literal["np"],
        return_stats: Literal[False] = ...,
        **options: Unpack[CompleteOptions],
    ) -> np.ndarray: ...
    @overload
    def complete(
        self,
        images: Any,
        n: int = ...,
        *,
        output_type: Literal["np"],
        return_stats: Literal[True],
        **options: Unpack[CompleteOptions],
    ) -> tuple[np.ndarray, Stats]: ...
    @overload
    def complete(
        self,
        images: Any,
        n: int = ...,
        *,
        output_type: Literal["pt", "tokens"],
        return_stats: Literal[False] = ...,
        **options: Unpack[CompleteOptions],
    ) -> torch.Tensor: ...
    @overload
    def complete(
        self,
        images: Any,
        n: int = ...,
        *,
        output_type: Literal["pt", "tokens"],
        return_stats: Literal[True],
        **options: Unpack[CompleteOptions],
    ) -> tuple[torch.Tensor, Stats]: ...
    @overload
    def complete(
        self,
        images: Any,
        n: int = ...,
        *,
        output_type: str,
        return_stats: bool = ...,
        **options: Unpack[CompleteOptions],
    ) -> Any: ...
    @takes_options(DEFAULTS)
    def complete(
        self,
        images: Any,
        n: int = 1,
        *,
        output_type: str = "pil",
        return_stats: bool = False,
        **options: Unpack[CompleteOptions],
    ) -> Any:
        """Draws n results for each image, keeping what is known exactly (as the palette has it); result j of image i
        comes at i·n + j.

        images: as for `encode`. What to draw anew is one of rows, mask and the transparent parts of the images. prompt:
        one for all or one for each image. output_type and return_stats: as for `sample`.
        """
        count = whole("n", n, 1)
        kind = output_kind(output_type)
        self._require_codec()
        pictures = as_image_list(images)
        known = self.known_cells(pictures, rows=options.pop("rows", None), mask=options.pop("mask", None))
        canvases = Repeated(self._encode(pictures).masked_fill(~known, -1), count)
        return self._draw(canvases, options, kind, return_stats=return_stats)

    @overload
    def fill(
        self,
        tokens: torch.Tensor,
        *,
        particles: int = ...,
        on_row: OnRow | None = ...,
        return_stats: Literal[False] = ...,
        **options: Unpack[JobOptions],
    ) -> torch.Tensor: ...
    @overload
    def fill(
        self,
        tokens: torch.Tensor,
        *,
        particles: int = ...,
        on_row: OnRow | None = ...,
        return_stats: Literal[True],
        **options: Unpack[JobOptions],
    ) -> tuple[torch.Tensor, Stats]: ...
    @overload
    def fill(
        self,
        tokens: torch.Tensor,
        *,
        particles: int = ...,
        on_row: OnRow | None = ...,
        return_stats: bool,
        **options: Unpack[JobOptions],
    ) -> Any: ...
    @takes_options(DEFAULTS)
    def fill(
        self,
        tokens: torch.Tensor,
        *,
        particles: int = 1,
        on_row: OnRow | None = None,
        return_stats: bool = False,
        **options: Unpack[JobOptions],
    ) -> Any:
        """int64 [B, h·w]: the unknown tokens drawn in raster order, the known ones kept exactly.

        tokens: int64 [B, h·w], −1 = draw. particles: as for `complete`. on_row(images, row, tokens) is called with
        every finished row: a range of images, the row's number and its tokens int64 [len(images), w]; not with
        particles, whose rows are not final before the end. return_stats: also returns Stats.
        """
        canvases = Repeated(token_array("tokens", tokens, self.spec, unknown=True, whole_canvas=True))
        how: Any = {**options, "particles": particles}
        return self._draw(canvases, how, "tokens", return_stats=return_stats, on_row=on_row)

    @takes_options(DEFAULTS)
    def stream(self, tokens_or_n: torch.Tensor | int, **options: Unpack[DrawOptions]) -> RowStream:
        """`fill` (or `sample`, for a number) as an iterator of finished rows: (images, row, tokens), a range of images
        of the job, the row's number, and its tokens int64 [len(images), w]; every row of every image comes once.

        tokens_or_n: int64 [B, h·w], −1 = draw, or how many empty canvases to draw.

        The work runs in a thread of its own, at most 32 rows ahead, and ends when the iterator is closed or dropped;
        arguments are checked at once. Any number of threads may sample, fill and stream from one model at the same
        time: each job gets the tokens it would get alone, and its own memory, for the images that it
        draws side by side.
        """
        if isinstance(tokens_or_n, (torch.Tensor, np.ndarray)):
            canvases = Repeated(token_array("tokens_or_n", tokens_or_n, self.spec, unknown=True, whole_canvas=True))
        else:
            canvases = self._empty(whole("tokens_or_n", tokens_or_n, 1))
        choice = self._checked(options, len(canvases))
        chunks_of_job, how = self._requests(canvases, choice), self._how(choice)

        def work(on_row: OnRow) -> None:
            for chunk, requests in chunks_of_job:

                def report(some: range, row: int, tokens: torch.Tensor, first: int = chunk.start) -> None:
                    on_row(range(some.start + first, some.stop + first), row, tokens)

                with self._named():
                    filled, _ = loop.run(self.engine, requests, on_row=report, **how)
                self._check_drawn(requests, filled)

        return RowStream(work, choice.drawing.seed)
