"""What stands between the network and the routes, as plain ASGI: an id, a line in the log and a count for every
request, the key, and a limit to its body before any parser sees it."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastigpt.server.errors import server_error, too_large, too_slow, wrong_key
from fastigpt.server.keys import Keys
from fastigpt.server.metrics import Metrics

LOG = logging.getLogger("fastigpt.server")

_WHOLE = 10  # times the patience for a part of a body is that for all of it

GONE = 499
"""Status of requests whose clients left before there was an answer; nobody receives it."""

OPEN = frozenset({"/", "/favicon.ico", "/healthz", "/readyz", "/metrics"})
"""Paths that need no key, besides those below PAGE."""
PAGE = "/page/"


def note(scope: Scope, **facts: Any) -> None:
    """Adds to what the log tells of a request."""
    scope.setdefault("fastigpt", {}).update(facts)


class Observed:
    """Gives every request an id (x-request-id), counts it and logs it. Whatever a route raises becomes an error that
    tells nothing. Never logs what was asked for or what was drawn."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        identity, started, status = f"req_{uuid.uuid4().hex}", time.perf_counter(), 0
        note(scope, request_id=identity)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", identity.encode())]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except ClientDisconnect:  # in the middle of its own request
            status = status or GONE
        except Exception as error:
            LOG.error("a request failed", exc_info=error, extra={"request_id": identity})
            if status == 0:
                await server_error().response()(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, str(status)).inc()
            facts = {"method": scope["method"], "route": route, "status": status, **scope["fastigpt"]}
            LOG.info("request", extra={**facts, "seconds": round(time.perf_counter() - started, 4)})


class Authorized:
    """Lets in who has a key, and everybody to OPEN."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics) -> None:
        self.app, self.keys, self.metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN and not scope["path"].startswith(PAGE):
            headers = dict(scope["headers"])
            given = headers.get(b"authorization")
            if not self.keys.allow(None if given is None else given.decode("latin-1")):
                self.metrics.refused.labels("key").inc()
                return await wrong_key().response()(scope, receive, send)
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses bodies of more than `limit` bytes, whether they say so or not, and those that do not go on for `patience`
    seconds or are not there after ten times as long. What is still being sent when there is an answer, whatever it is,
    is read and thrown away, up to as much again: a connection that is closed over it would be reset, and the answer
    lost."""

    def __init__(self, app: ASGIApp, limit: int, patience: float, metrics: Metrics) -> None:
        self.app, self.limit, self.patience, self.metrics = app, limit, patience, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body, answered = _Body(receive, self.patience), False

        async def limited() -> Message:
            message = await body.receive()
            if body.arrived > self.limit:
                raise _Large
            return message

        async def answer(message: Message) -> None:
            nonlocal answered
            if not answered and declared <= 2 * self.limit:
                await body.discard(2 * self.limit)
            answered = True
            await send(message)

        text = dict(scope["headers"]).get(b"content-length", b"")
        declared = int(text) if text.isdigit() and len(text) < 20 else 0
        try:
            if declared > self.limit:
                raise _Large
            await self.app(scope, limited, answer)
        except _Large:
            self.metrics.refused.labels("size").inc()
            await too_large(self.limit).response()(scope, receive, answer)
        except _Slow:
            self.metrics.refused.labels("slow").inc()
            if not answered:
                await too_slow(self.patience).response()(scope, receive, send)


class _Body:
    """arrived: bytes of it. complete: whether that is all."""

    def __init__(self, receive: Receive, patience: float) -> None:
        self._receive, self._patience = receive, patience
        self._end = asyncio.get_running_loop().time() + _WHOLE * patience
        self.arrived, self.complete = 0, False

    async def receive(self) -> Message:
        if self.complete:  # there is only the client's leaving to wait for
            return await self._receive()
        try:
            async with asyncio.timeout_at(min(self._end, asyncio.get_running_loop().time() + self._patience)):
                message = await self._receive()
        except TimeoutError:
            raise _Slow from None
        self.arrived += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        return message

    async def discard(self, most: int) -> None:
        """Reads what is left of it, until so many bytes have arrived in all."""
        with suppress(_Slow):
            while not self.complete and self.arrived < most:
                await self.receive()


class _Large(BaseException):
    """Passes through whatever catches exceptions in between."""


class _Slow(BaseException):
    """Likewise."""
