"""The operator's endpoint is asked in OpenAI's format, and nothing gets past it when it fails."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import openai
import pytest
from live import live, pixels, png
from PIL import Image

from fastigpt.server.moderation import Moderation
from fastigpt.server.moderation_endpoint import KEY, Endpoint
from fastigpt.server.service import Settings

FINE = {"id": "modr-1", "model": "m", "results": [{"flagged": False, "categories": {"violence": False}}]}


class Judge(HTTPServer):
    """Answers with `answer`: an object, bytes, or a status. asked: the bodies it was sent; headers: of the last."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[Any] = []
        self.headers: dict[str, str] = {}
        self.answer: Any = FINE

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/moderations"


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.server.headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.server.answer(body) if callable(self.server.answer) else self.server.answer
        self.send_response(answer if isinstance(answer, int) else 200)
        if answer == 302:
            self.send_header("location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.end_headers()
        self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def judge() -> Iterator[Judge]:
    with Judge() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def decoded(part: dict[str, Any]) -> np.ndarray:
    head, _, data = part["image_url"]["url"].partition(",")
    assert part["type"] == "image_url" and head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def flagged(*categories: str) -> dict[str, Any]:
    return {"results": [{"flagged": True, "categories": {"hate": False, **dict.fromkeys(categories, True)}}]}


def test_it_is_asked_about_words_uploads_and_pictures(monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    photo = np.full((6, 4, 3), 128, np.uint8)
    with judge() as theirs, live(settings=Settings(moderation=Moderation(hook=Endpoint(theirs.url)))) as server:
        answer = server.client().images.edit(image=png(photo), prompt="a tree", n=2, extra_body={"rows": 1, "seed": 1})
        first, *others = (body["input"] for body in theirs.asked)
        assert first[0] == {"type": "text", "text": "a tree"} and np.array_equal(decoded(first[1]), photo)
        assert theirs.headers["authorization"] == "Bearer secret"
        seen = sorted(decoded(part).tobytes() for (part,) in others)
        assert seen == sorted(pixels(image.b64_json).tobytes() for image in answer.data)


def test_what_it_flags_is_refused():
    with judge() as theirs, live(settings=Settings(moderation=Moderation(hook=Endpoint(theirs.url)))) as server:
        theirs.answer = flagged("violence", "self-harm")
        with pytest.raises(openai.BadRequestError) as caught:
            server.client().images.generate(prompt="a tree")
        expected = {"moderation_stage": "input", "categories": ["self-harm", "violence"]}
        assert caught.value.body["moderation_details"] == expected
        assert server.batch.counts.images == 0 and "authorization" not in theirs.headers
        theirs.answer = lambda body: FINE if body["input"][0]["type"] == "text" else flagged("sexual")
        with pytest.raises(openai.BadRequestError) as caught:
            server.client().images.generate(prompt="a tree")
        assert caught.value.body["moderation_details"] == {"moderation_stage": "output", "categories": ["sexual"]}


@pytest.mark.parametrize(
    "answer",
    [
        500,
        302,
        b"",
        b"{",
        b"[]",
        b"null",
        {"results": []},
        {"results": [{}]},
        {"results": [{"flagged": "no"}]},
        {"results": {"flagged": False}},
        b'{"results": ' + b"[" * 200_000,
        b" " * (1 << 20) + b"{}",
    ],
)
def test_an_answer_that_is_none_lets_nothing_through(answer):
    with judge() as theirs, live(settings=Settings(moderation=Moderation(hook=Endpoint(theirs.url)))) as server:
        theirs.answer = answer
        with pytest.raises(openai.InternalServerError):
            server.client().images.generate(prompt="a tree")
        assert len(theirs.asked) == 1 and server.batch.counts.images == 0


def test_an_endpoint_that_is_not_there_lets_nothing_through():
    with judge() as theirs:
        url = theirs.url
    moderation = Moderation(hook=Endpoint(url))
    with live(settings=Settings(moderation=moderation)) as server, pytest.raises(openai.InternalServerError):
        server.client().images.generate(prompt="a tree")


@pytest.mark.parametrize("url", ["ftp://host/x", "file:///etc/passwd", "http://", "https:///path"])
def test_other_urls_are_refused(url):
    with pytest.raises(ValueError, match="--moderation"):
        Endpoint(url)
