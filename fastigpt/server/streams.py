"""Server-sent events, and when a stream shows a picture that is not finished."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import torch
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

KEEP_ALIVE = 15.0
"""Seconds without an event after which a comment is sent, so that nothing on the way gives the connection up."""


class EventStream(StreamingResponse):
    """Closes what it iterates over whenever it ends, also where the client leaves between two events."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


def event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def partial_rows(canvas: torch.Tensor, partials: int) -> list[int]:
    """Numbers of final rows at which partial images are shown, at most so many, evenly spread over what is drawn.
    canvas: int64 [height, columns], −1 = draw."""
    drawn = (canvas < 0).any(1).nonzero()[:, 0].tolist()
    places = (round(len(drawn) * k / (partials + 1)) for k in range(1, partials + 1))
    return sorted({drawn[place - 1] + 1 for place in places if 0 < place < len(drawn)})


async def with_keep_alive(
    parts: AsyncIterator[bytes], seconds: float = KEEP_ALIVE, comment: bytes = b": keep-alive\n\n"
) -> AsyncGenerator[bytes]:
    """The parts, and comments in between while none comes."""
    following: asyncio.Future[bytes] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(parts))
            await asyncio.wait({following}, timeout=seconds)
            if not following.done():
                yield comment
                continue
            try:
                part = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield part
    finally:
        if following is not None:
            following.cancel()
