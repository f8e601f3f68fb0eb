"""The process of `fastigpt serve`: loads the models, listens, and ends without losing a picture."""

from __future__ import annotations

import ipaddress
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from fastigpt.api import load
from fastigpt.server import logs
from fastigpt.server.app import create_app
from fastigpt.server.batch import Batch
from fastigpt.server.parameters import MOST_IMAGES
from fastigpt.server.served import Served
from fastigpt.server.service import Service, Settings

BUNDLED = "fastigpt-scenes"
"""What the model that comes with the package is called, unless the operator calls it otherwise."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 2048  # connections that the system holds until they are taken
_LAST_WORDS = 30  # seconds in which drawn images must have been sent when the process ends


@dataclass(frozen=True)
class Address:
    """Where a server listens. connections: at most; whoever comes then gets a bare 503."""

    host: str = "127.0.0.1"
    port: int = 8000
    connections: int = 1024


def check_exposure(host: str, *, keys: bool, no_auth: bool) -> None:
    """Raises ValueError for a host that others can reach, unless there are keys or the operator wants none."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not (loopback or keys or no_auth):
        raise ValueError(
            f"--host {host} can be reached from elsewhere, and anybody could draw: give --keys, or --no-auth if that "
            "is meant"
        )


def listen(address: Address) -> socket.socket:
    """A socket that is bound, so that nobody loads a model for nothing. Raises OSError that says where."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
    except OSError as error:
        raise OSError(f"cannot listen on {address.host}:{address.port}: {error.strerror or error}") from None
    bound.set_inheritable(False)
    return bound


def load_models(
    models: Mapping[str, str | None], loading: Mapping[str, Any], batches: Mapping[str, Any]
) -> list[Served]:
    """Models by the names clients call them, None = the one in the package, each with its batch running. loading: of
    `fastigpt.load`. batches: of Batch. Raises what these raise, and ValueError for batches too small for one
    request."""
    found = []
    for name, path in models.items():
        model = load(path, **loading)
        batch = Batch(model, **batches)
        if batch.capacity + batch.max_queue < MOST_IMAGES:
            raise ValueError(
                f"a request may ask for {MOST_IMAGES} images: {batch.capacity} slots and a queue of {batch.max_queue} "
                "would never let it in (--batch-size, --max-queue)"
            )
        batch.start()
        served = Served(name, model, batch)
        _ = served.size  # a model without a palette draws no pictures: told now
        found.append(served)
    return found


def serve(
    models: Mapping[str, str | None],
    address: Address,
    settings: Settings,
    *,
    loading: Mapping[str, Any],
    batches: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> int:
    """Serves until SIGTERM or SIGINT; then takes no more requests, finishes those it has, and returns the exit status:
    0, or the signal's if a second one did not let it finish. notes: what else the operator is told at the start."""
    with listen(address) as bound:
        served = load_models(models, loading, batches)
        service = Service(served, settings)
        logs.configure()
        server = Server(create_app(service), service.drain, address.connections)
        where = f"http://{_bracketed(address.host)}:{bound.getsockname()[1]}"
        bound.listen(_BACKLOG)  # before anybody is told
        print(f"serving {', '.join(models)} at {where}; clients take base_url={where}/v1", *notes, sep="\n", flush=True)
        server.run(sockets=[bound])
        service.close()
    return 0 if server.forced is None else 128 + server.forced


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Server(uvicorn.Server):
    """drain: called in a thread of its own at the first signal; the server goes on answering, and stops when it
    returns, and when what is open then was answered. A second signal stops it at once. forced: that signal."""

    def __init__(self, app: ASGIApp, drain: Callable[[], None], connections: int = 1024) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=connections,
                timeout_graceful_shutdown=_LAST_WORDS,
            )
        )
        self.forced: int | None = None
        self._drain, self._draining = drain, False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, which sends itself the signal again once all is well: the exit status would be its."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining:
            self.forced, self.force_exit, self.should_exit = sig, True, True
            return
        self.stop()

    def stop(self) -> None:
        """Begins to end, as at a signal."""
        self._draining = True
        threading.Thread(target=self._end, name="fastigpt.drain", daemon=True).start()

    def _end(self) -> None:
        try:
            self._drain()
        except Exception as error:
            print(f"error: while draining: {error}", file=sys.stderr)
        self.should_exit = True
