"""A server that listens, in a thread of the test's own process, and what tests say to it."""

from __future__ import annotations

import base64
import io
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import numpy as np
import openai
from PIL import Image
from served_models import Gate, tiny_model

from fastigpt import ImageGPT
from fastigpt.server.app import create_app
from fastigpt.server.batch import Batch
from fastigpt.server.run import Address, Server, listen
from fastigpt.server.served import Served
from fastigpt.server.service import Service, Settings


class Live:
    """url: of the server, without /v1."""

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url
        self.model = service.default.model
        self.batch = service.default.batch

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})

    def asynchronous(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **options})

    def post(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}{path}", timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(f"{self.url}{path}", timeout=60, **options)


@contextmanager
def live(*models: ImageGPT, settings: Settings | None = None, **batches: Any) -> Iterator[Live]:
    """models: served as "tiny", "second", …; none: a tiny one. batches: of Batch."""
    served = []
    for name, model in zip(("tiny", "second"), models or (tiny_model(),)):
        batch = Batch(model, **{"capacity": 4, **batches})
        batch.start()
        served.append(Served(name, model, batch))
    service = Service(served, settings or Settings())
    with listen(Address(port=0)) as bound:
        bound.listen()  # whoever connects from now on is heard, however long the server takes to start
        server = Server(create_app(service), service.drain)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield Live(service, f"http://127.0.0.1:{bound.getsockname()[1]}")
        finally:
            for one in served:
                if isinstance(one.model.engine, Gate):
                    one.model.engine.let_all()
            server.stop()
            thread.join(120)
            service.close()
    assert not thread.is_alive()
    assert all(one.batch.running == one.batch.waiting == 0 for one in served)


def pixels(b64_json: str | None) -> np.ndarray:
    """uint8 [H, W, 3] of a picture in an answer."""
    assert b64_json is not None
    picture = Image.open(io.BytesIO(base64.b64decode(b64_json)))
    assert picture.mode == "RGB"
    return np.asarray(picture)


def png(array: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format)
    return file.getvalue()


class Records(logging.Handler):
    """What the server logs; `wait` returns the first line that is as it should be."""

    def __init__(self) -> None:
        super().__init__()
        self._there = threading.Condition()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        with self._there:
            self.records.append(record)
            self._there.notify_all()

    def wait(self, like: Callable[[Any], bool]) -> logging.LogRecord:
        with self._there:
            assert self._there.wait_for(lambda: any(like(record) for record in self.records), 120)
            return next(record for record in self.records if like(record))


@contextmanager
def records() -> Iterator[Records]:
    logger, handler = logging.getLogger("fastigpt.server"), Records()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
