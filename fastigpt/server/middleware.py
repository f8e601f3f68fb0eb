"""What stands between the network and the routes, as plain ASGI: an id, a line in the log and a count for every
request, the key, and a limit to its body before any parser sees it."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastigpt.server.errors import server_error, too_large, too_slow, wrong_key
from fastigpt.server.keys import Keys
from fastigpt.server.metrics import Metrics

LOG = logging.getLogger("fastigpt.server")

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
    seconds. What a client is still sending is read and thrown away, up to as much again, so that it hears the answer.
    """

    def __init__(self, app: ASGIApp, limit: int, patience: float, metrics: Metrics) -> None:
        self.app, self.limit, self.patience, self.metrics = app, limit, patience, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            return await self._refuse(scope, receive, send, int(declared))
        arrived, complete, answered = 0, False, False

        async def limited() -> Message:
            nonlocal arrived, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(self.patience):
                    message = await receive()
            except TimeoutError:
                raise _Slow from None
            arrived += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if arrived > self.limit:
                raise _Large
            return message

        async def watched(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self.app(scope, limited, watched)
        except _Large:
            if not answered:
                await self._refuse(scope, receive, send, None)
        except _Slow:
            self.metrics.refused.labels("slow").inc()
            if not answered:
                await too_slow(self.patience).response()(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, declared: int | None) -> None:
        self.metrics.refused.labels("size").inc()
        if declared is None or declared <= 2 * self.limit:
            await _discard(receive, self.limit, self.patience)
        await too_large(self.limit).response()(scope, receive, send)


class _Large(BaseException):
    """Passes through whatever catches exceptions in between."""


class _Slow(BaseException):
    """Likewise."""


async def _discard(receive: Receive, most: int, patience: float) -> None:
    try:
        async with asyncio.timeout(patience):
            while most > 0:
                message = await receive()
                most -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
