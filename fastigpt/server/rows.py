"""POST /rows: what the page draws with. Takes what the Images API takes and answers in lines of JSON, in which rows of
pictures arrive as they are drawn:

    {"type": "start", "model", "seed", "height", "width", "indices", "signed"[, "kept": RGBA in base64]}
    {"type": "rows", "image", "row", "rows", "pixels": RGB in base64}
    {"type": "image", "image", "index", "b64_json"}
    {"type": "error", "error": as everywhere}
    {"type": "end"}

Sizes and rows count pixels of the picture as the model draws it; of an upload `kept` shows what stays, the rest
transparent. Seeds and indices are strings: JavaScript rounds numbers that are so large. Empty lines keep the connection
open.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np
import torch
from starlette.requests import Request
from starlette.responses import Response

from fastigpt.server.bodies import read_edit
from fastigpt.server.errors import ApiError, invalid, unsupported_parameter
from fastigpt.server.images import Asked, failed, finished, observe, submit
from fastigpt.server.middleware import note
from fastigpt.server.parameters import Edit, parsed
from fastigpt.server.routes import edit_asked, generation_asked
from fastigpt.server.service import Service
from fastigpt.server.streams import EventStream, with_keep_alive
from fastigpt.server.ticket import Done, Failed, Rows, Ticket

_OF_OTHER_ROUTES = ("stream", "partial_images", "response_format")


async def understood(service: Service, request: Request) -> Asked:
    """What a body, a form or JSON, asks for: a picture, or parts of an upload anew. Raises ApiError."""
    body = await read_edit(request)
    for name in _OF_OTHER_ROUTES:
        if name in body.given:
            raise unsupported_parameter(name)
    given = parsed(Edit, body.given, strings=body.strings)
    if body.images:
        return await edit_asked(service, body, given)
    if body.mask is not None or given.rows is not None:
        name = "rows" if body.mask is None else "mask"
        raise invalid(name, f"'{name}' says what to keep of an image, and there is none.")
    return generation_asked(service, given)


async def answer(service: Service, request: Request, asked: Asked) -> Response:
    """Draws it. Raises ApiError for what is refused."""
    note(request.scope, model=asked.served.name, images=asked.given.n)
    await service.moderate(asked.question("input"))
    # Rows would show what a hook that judges pictures was not asked about.
    ticket = submit(service, asked, rows=not service.settings.moderation.sees_pictures)
    stream = _stream(service, request, asked, ticket)
    return EventStream(stream, headers={"cache-control": "no-store"}, media_type="application/x-ndjson")


async def _stream(service: Service, request: Request, asked: Asked, ticket: Ticket) -> AsyncGenerator[bytes]:
    over = False
    try:
        async with aclosing(with_keep_alive(_lines(service, asked, ticket), comment=b"\n")) as lines:
            async for line in lines:
                yield line
        observe(service, request, asked, ticket)
        over = True
        yield _line({"type": "end"})
    except ApiError as error:  # the answer has begun: its status is sent
        over = True
        note(request.scope, error=error.code)
        yield _line({"type": "error", "error": error.error})
    finally:
        if not over:
            note(request.scope, cancelled=service.settings.cancel_on_disconnect)
        if over or service.settings.cancel_on_disconnect:
            ticket.cancel()


async def _lines(service: Service, asked: Asked, ticket: Ticket) -> AsyncGenerator[bytes]:
    yield _line(_start(service, asked))
    async with aclosing(ticket.events()) as events:
        async for happened in events:
            if isinstance(happened, Failed):
                raise failed(happened, asked)
            if isinstance(happened, Rows):
                yield _line(_rows(asked, happened))
            if isinstance(happened, Done):
                service.metrics.passes.observe(happened.passes)
                file = await finished(service, asked, happened.image, happened.tokens)
                index = str(asked.job.requests[happened.image].index)
                picture = {"type": "image", "image": happened.image, "index": index, "b64_json": _base64(file)}
                yield _line(picture)


def _start(service: Service, asked: Asked) -> dict[str, Any]:
    width, height = asked.served.size
    start = {
        "type": "start",
        "model": asked.served.name,
        "seed": str(asked.job.seed),
        "height": height,
        "width": width,
        "indices": [str(request.index) for request in asked.job.requests],
        "signed": service.settings.sign is not None,
    }
    if asked.upload is not None:
        start["kept"] = _base64(_kept(asked).tobytes())
    return start


def _kept(asked: Asked) -> np.ndarray:
    """uint8 [H, W, 4]: what is known of a picture before anything is drawn, the rest transparent."""
    spec, pixels = asked.served.spec, asked.served.pixels(asked.job.canvas)
    known = (asked.job.canvas >= 0).view(spec.height, spec.columns).numpy()
    height, width = len(pixels) // spec.height, pixels.shape[1] // spec.columns
    alpha = np.uint8(255) * known.repeat(height, 0).repeat(width, 1)
    return np.concatenate([pixels, alpha[..., None]], -1)


def _rows(asked: Asked, happened: Rows) -> dict[str, Any]:
    spec = asked.served.spec
    canvas = torch.full((spec.height, spec.columns), -1, dtype=torch.int64, device="cpu")
    canvas[happened.first_row : happened.first_row + len(happened.tokens)] = happened.tokens
    pixels = asked.served.pixels(canvas.flatten())
    each = len(pixels) // spec.height
    first, count = happened.first_row * each, len(happened.tokens) * each
    seen = np.ascontiguousarray(pixels[first : first + count])
    return {"type": "rows", "image": happened.image, "row": first, "rows": count, "pixels": _base64(seen.tobytes())}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"
