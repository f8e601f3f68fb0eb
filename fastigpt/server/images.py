"""POST /v1/images/generations and /v1/images/edits: from parsed parameters to pictures, whole or as a stream."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from fastigpt.server.batch import Draining, QueueFull
from fastigpt.server.errors import ApiError, draining, json_response, queue_full, server_error, took_too_long
from fastigpt.server.middleware import GONE, note
from fastigpt.server.moderation import Question
from fastigpt.server.parameters import Common
from fastigpt.server.pictures import Encoding
from fastigpt.server.served import Job, Served
from fastigpt.server.service import Drawn, Service
from fastigpt.server.streams import EventStream, event, partial_rows, with_keep_alive
from fastigpt.server.ticket import Done, Failed, Rows, Ticket, TimeLimit

Json = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A request that was understood. kind: "image_generation" or "image_edit", as events are named. files: of uploads
    that its pictures are made from."""

    kind: str
    given: Common
    served: Served
    job: Job
    how: Encoding
    upload: Image.Image | None = None
    files: tuple[bytes, ...] = ()

    def question(self, stage: Any, picture: Image.Image | None = None) -> Question:
        return Question(
            stage,
            self.served.name,
            self.given.prompt,
            self.given.negative_prompt,
            self.given.moderation or "auto",
            self.given.safety_identifier,
            self.upload,
            picture,
        )

    def described(self) -> Json:
        """What every answer tells of its pictures."""
        width, height = self.served.size
        return {
            "size": f"{width * self.how.scale}x{height * self.how.scale}",
            "quality": self.given.quality or "auto",
            "background": "opaque",
            "output_format": self.how.format,
        }

    def usage(self, images: int) -> Json:
        """In tokens: words that were read, pixels that were known, pixels that were drawn."""
        words, known = self.job.words, self.job.known
        drawn = images * (len(self.job.canvas) - known)
        return {
            "input_tokens": words + known,
            "input_tokens_details": {"text_tokens": words, "image_tokens": known},
            "output_tokens": drawn,
            "output_tokens_details": {"image_tokens": drawn, "text_tokens": 0},
            "total_tokens": words + known + drawn,
        }

    def drawn(self, image: int) -> Drawn:
        return Drawn(self.served.name, self.job.seed, self.job.requests[image].index, self.files)


async def answer(service: Service, request: Request, asked: Asked) -> Response:
    """Draws what was asked for. Raises ApiError for what is refused, and for what fails before anything was sent."""
    note(request.scope, model=asked.served.name, images=asked.given.n)
    await service.moderate(asked.question("input"))
    partials = asked.given.partial_images if asked.given.stream else 0
    ignored = asked.given.without_effect(bool(service.settings.moderation))
    if service.settings.moderation.sees_pictures and partials:
        partials = 0  # they would show what the hook was not asked about
        ignored.append("partial_images")
    ticket = submit(service, asked, rows=partials > 0)
    headers = {"x-fastigpt-ignored": ", ".join(ignored)} if ignored else {}
    if asked.given.stream:
        stream = _stream(service, request, asked, ticket, partials)
        return EventStream(stream, headers={"cache-control": "no-store", **headers}, media_type="text/event-stream")
    return await _unless_gone(service, request, ticket, _whole(service, request, asked, ticket, headers))


def submit(service: Service, asked: Asked, *, rows: bool) -> Ticket:
    """Puts its images into the queue. rows: whether they are told of row by row. Raises ApiError."""
    try:
        return asked.served.batch.submit(asked.job.requests, rows=rows)
    except QueueFull as full:
        service.metrics.refused.labels("queue").inc()
        raise queue_full(full.retry_after) from None
    except Draining:
        service.metrics.refused.labels("draining").inc()
        raise draining() from None


async def _unless_gone(service: Service, request: Request, ticket: Ticket, work: Any) -> Response:
    """Runs the work, and gives it up when the client leaves."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request))
    try:
        if service.settings.cancel_on_disconnect:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                ticket.cancel()
                working.cancel()
                note(request.scope, cancelled=True)
                return Response(status_code=GONE)
        return await working
    except asyncio.CancelledError:
        ticket.cancel()
        working.cancel()
        raise
    finally:
        watching.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _whole(service: Service, request: Request, asked: Asked, ticket: Ticket, headers: dict[str, str]) -> Response:
    files: dict[int, asyncio.Task[bytes]] = {}
    try:
        async with asyncio.TaskGroup() as encoding, aclosing(ticket.events()) as events:
            async for happened in events:
                if isinstance(happened, Failed):
                    raise failed(happened, asked)
                if isinstance(happened, Done):
                    service.metrics.passes.observe(happened.passes)
                    file = finished(service, asked, happened.image, happened.tokens)
                    files[happened.image] = encoding.create_task(file)
            observe(service, request, asked, ticket)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        ticket.cancel()
    data = [
        {
            "b64_json": base64.b64encode(files[image].result()).decode(),
            "index": asked.job.requests[image].index,
        }
        for image in range(asked.given.n)
    ]
    body = {
        "created": int(time.time()),
        "data": data,
        **asked.described(),
        "usage": asked.usage(asked.given.n),
        "seed": asked.job.seed,
    }
    if asked.given.safety_identifier is not None:
        body["safety_identifier"] = asked.given.safety_identifier
    return json_response(body, headers=headers)


async def finished(service: Service, asked: Asked, image: int, tokens: torch.Tensor) -> bytes:
    """The file of a finished picture, if it may be seen."""
    if service.settings.moderation.sees_pictures:
        picture = Image.fromarray(await service.encode(partial(asked.served.pixels, tokens)))
        await service.moderate(asked.question("output", picture))
    return await service.encode(partial(service.picture, asked.served, tokens, asked.how, asked.drawn(image)))


def observe(service: Service, request: Request, asked: Asked, ticket: Ticket) -> None:
    """Counts and logs how long a request waited and how long it was drawn."""
    now = asked.served.batch.now()
    started = now if ticket.started is None else ticket.started
    service.metrics.queue.observe(started - ticket.submitted)
    service.metrics.draw.observe(now - started)
    first_row = (now if ticket.first_row is None else ticket.first_row) - ticket.submitted
    service.metrics.first_row.observe(first_row)
    note(
        request.scope,
        queue_seconds=round(started - ticket.submitted, 4),
        first_row_seconds=round(first_row, 4),
        draw_seconds=round(now - started, 4),
    )


def failed(happened: Failed, asked: Asked) -> ApiError:
    """What a client is told of it."""
    if isinstance(happened.error, TimeLimit):
        return took_too_long(asked.served.batch.timeout)
    return server_error()  # the batch has logged it


async def _stream(
    service: Service, request: Request, asked: Asked, ticket: Ticket, partials: int
) -> AsyncGenerator[bytes]:
    """Server-sent events, image after image: each its partial images, then the finished one."""
    over = False
    try:
        async with aclosing(with_keep_alive(_events(service, asked, ticket, partials))) as parts:
            async for part in parts:
                yield part
        observe(service, request, asked, ticket)
        over = True
    except ApiError as error:  # the answer has begun: its status is sent
        over = True
        note(request.scope, error=error.code)
        yield event("error", {"type": "error", "error": error.error})
    finally:
        if not over:
            note(request.scope, cancelled=service.settings.cancel_on_disconnect)
        if over or service.settings.cancel_on_disconnect:
            ticket.cancel()


async def _events(service: Service, asked: Asked, ticket: Ticket, partials: int) -> AsyncGenerator[bytes]:
    marks = partial_rows(asked.job.canvas.view(asked.served.spec.height, -1), partials)
    count, turn = asked.given.n, 0
    images = [_Image(asked) for _ in range(count)]
    async with aclosing(ticket.events()) as events:
        async for happened in events:
            if isinstance(happened, Failed):
                raise failed(happened, asked)
            images[happened.image].take(happened)
            if isinstance(happened, Done):
                service.metrics.passes.observe(happened.passes)
            while turn < count:
                image = images[turn]
                for mark in marks[image.shown : sum(row <= image.rows for row in marks)]:
                    seen = image.until(mark)
                    file = await service.encode(
                        partial(service.picture, asked.served, seen, asked.how, asked.drawn(turn))
                    )
                    yield _told(asked, "partial_image", file, {"partial_image_index": image.shown})
                    image.shown += 1
                if image.finished is None:
                    break
                file = await finished(service, asked, turn, image.finished)
                more = {"usage": asked.usage(1), "seed": asked.job.seed, "index": asked.job.requests[turn].index}
                yield _told(asked, "completed", file, more)
                turn += 1


def _told(asked: Asked, what: str, file: bytes, more: Json) -> bytes:
    kind = f"{asked.kind}.{what}"
    picture = {"type": kind, "b64_json": base64.b64encode(file).decode(), "created_at": int(time.time())}
    return event(kind, {**picture, **asked.described(), **more})


class _Image:
    """How far one image of a stream has come. rows: that are final. shown: partial images that were sent. finished:
    its tokens, or None."""

    def __init__(self, asked: Asked) -> None:
        self._columns = asked.served.spec.columns
        self._asked, self._canvas = asked.job.canvas, asked.job.canvas.clone()
        self.rows, self.shown = 0, 0
        self.finished: torch.Tensor | None = None

    def take(self, happened: Rows | Done) -> None:
        if isinstance(happened, Done):
            self.finished = happened.tokens
            return
        first, lines = happened.first_row * self._columns, happened.tokens.flatten()
        self._canvas[first : first + len(lines)] = lines
        self.rows = happened.first_row + len(happened.tokens)

    def until(self, row: int) -> torch.Tensor:
        """The canvas as it was when that many rows were final."""
        return torch.cat([self._canvas[: row * self._columns], self._asked[row * self._columns :]])
