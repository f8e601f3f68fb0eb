"""Whatever is wrong is told in OpenAI's body, with the name of the parameter and a request id, and
nothing of the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live import Live, live
from served_models import Gate, tiny_model


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as found:
        yield found


def error(answer: Any) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-request-id"].startswith("req_")
    found = answer.json()
    assert found.keys() == {"error"} and found["error"].keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text and "fastigpt/" not in answer.text and "/tmp" not in answer.text
    return found["error"]


@pytest.mark.parametrize(
    "body, param, code",
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": 3}, "prompt", "invalid_type"),
        ({"prompt": ["a red house"]}, "prompt", "invalid_type"),
        ({"prompt": "x" * 32_001}, "prompt", "invalid_value"),
        ({"prompt": "a red horse"}, "prompt", "invalid_value"),
        ({"prompt": "a red house in blue"}, "prompt", "invalid_value"),
        ({"prompt": "!!!"}, "prompt", "invalid_value"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"n": 1.0}, "n", "invalid_type"),
        ({"n": "1"}, "n", "invalid_type"),
        ({"n": True}, "n", "invalid_type"),
        ({"n": 10**400}, "n", "invalid_value"),
        ({"model": 1}, "model", "invalid_type"),
        ({"size": 1024}, "size", "invalid_type"),
        ({"size": "1024x1024"}, "size", "invalid_value"),
        ({"quality": "best"}, "quality", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_format": "svg"}, "output_format", "invalid_value"),
        ({"output_compression": 50}, "output_compression", "invalid_value"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression", "invalid_value"),
        ({"moderation": "none"}, "moderation", "invalid_value"),
        ({"stream": "true"}, "stream", "invalid_type"),
        ({"stream": 1}, "stream", "invalid_type"),
        ({"partial_images": 4}, "partial_images", "invalid_value"),
        ({"response_format": "url"}, "response_format", "invalid_value"),
        ({"style": {}}, "style", "invalid_type"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"seed": "7"}, "seed", "invalid_type"),
        ({"first_index": 2**63}, "first_index", "invalid_value"),
        ({"first_index": 2**63 - 1, "n": 2}, "first_index", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": 1e39}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"top_k": 0}, "top_k", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.1}, "top_p", "invalid_value"),
        ({"guidance_scale": 2}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": 1e31, "prompt": "a tree"}, "guidance_scale", "invalid_value"),
        ({"negative_prompt": "a tree", "prompt": "a tree"}, "negative_prompt", "invalid_value"),
        ({"negative_prompt": "a horse", "prompt": "a tree", "guidance_scale": 2}, "negative_prompt", "invalid_value"),
        ({"rows": 3}, "rows", "unknown_parameter"),
        ({"input_fidelity": "low"}, "input_fidelity", "unknown_parameter"),
        ({"promt": ""}, "promt", "unknown_parameter"),
        ({"markup": "x"}, "markup", "unsupported_parameter"),
        ({"svg": {}}, "svg", "unsupported_parameter"),
        ({"frame_count": 2}, "frame_count", "unsupported_parameter"),
    ],
)
def test_parameters_are_named(server, body, param, code):
    # In ASCII, as half a surrogate pair has no other spelling.
    sent = json.dumps({"prompt": "", **body} if body else {}).encode()
    answer = server.post("/v1/images/generations", content=sent, headers={"content-type": "application/json"})
    found = error(answer)
    assert answer.status_code == 400 and found["type"] == "invalid_request_error", answer.text
    assert (found["param"], found["code"]) == (param, code), answer.text


def test_unknown_words_are_named_with_those_that_are_near(server):
    with pytest.raises(openai.BadRequestError, match=r"prompt: unknown word 'horse' \(near: house"):
        server.client().images.generate(prompt="a red horse")
    with pytest.raises(openai.BadRequestError, match=r"negative_prompt: unknown word 'treee' \(near: tree"):
        how = {"negative_prompt": "a treee", "guidance_scale": 1}
        server.client().images.generate(prompt="a red house", extra_body=how)
    with pytest.raises(openai.BadRequestError, match="Did you mean 'temperature'"):
        server.client().images.generate(prompt="", extra_body={"temprature": 1})


def repr_of(content: bytes) -> str:
    return repr(content[:12])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"prompt": NaN}',
        b'{"prompt": Infinity}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"n": 1' + b"0" * 5000 + b"}",
        b'"' + b"x" * 2_000_000,
    ],
    ids=repr_of,
)
def test_what_is_no_json_object_is_told(server, content):
    for route in ("generations", "edits"):
        headers = {"content-type": "application/json; charset=utf-8"}
        answer = server.post(f"/v1/images/{route}", content=content, headers=headers)
        assert answer.status_code == 400 and error(answer)["code"] == "invalid_json", answer.text


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded"])
def test_bodies_of_another_kind(server, kind):
    for route in ("generations", "edits"):
        answer = server.post(f"/v1/images/{route}", content=b'{"prompt": ""}', headers={"content-type": kind})
        assert answer.status_code == 415 and error(answer)["code"] == "unsupported_content_type"


@pytest.mark.parametrize("content", [b"", b"nonsense", b"--b\r\n", b"--b\r\nbroken\r\n\r\n", b"--b--\r\n"])
@pytest.mark.parametrize("boundary", ["; boundary=b", ""])
def test_broken_forms(server, content, boundary):
    headers = {"content-type": f"multipart/form-data{boundary}"}
    answer = server.post("/v1/images/edits", content=content, headers=headers)
    assert answer.status_code == 400 and error(answer)


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/nowhere", 404),
        ("POST", "/v1/images/variations", 404),
        ("GET", "/v1/images/generations", 405),
        ("PUT", "/v1/models", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/docs", 404),
    ],
)
def test_other_routes(server, method, path, status):
    import httpx2

    answer = httpx2.request(method, server.url + path)
    assert answer.status_code == status and error(answer)["message"]


def test_an_engine_that_fails_is_nobodys_fault_and_the_next_picture_comes():
    model = tiny_model()
    gate = Gate(model)
    with live(model) as server:
        gate.error = RuntimeError("/secret/place: the device is gone")
        gate.let_all()
        with pytest.raises(openai.InternalServerError) as caught:
            server.client().images.generate(prompt="")
        assert caught.value.code == "server_error" and caught.value.type == "server_error"
        assert "secret" not in caught.value.response.text and caught.value.status_code == 500
        assert server.client().images.generate(prompt="").data


def test_a_bug_in_a_route_is_an_error_like_others(server, monkeypatch):
    def broken(*_: object) -> None:
        raise KeyError("/secret/place")

    monkeypatch.setattr(server.service, "find", broken)
    answer = server.post("/v1/images/generations", json={"prompt": ""})
    assert answer.status_code == 500 and error(answer)["code"] == "server_error" and "secret" not in answer.text


def test_a_request_that_takes_too_long_is_told_not_to_come_again():
    model, now = tiny_model(), [0.0]
    gate = Gate(model)
    with live(model, timeout=60, clock=lambda: now[0]) as server, gate.closed():
        import threading

        def later() -> None:
            gate.stands.wait(60)
            now[0] = 61.0
            gate.let(1)

        threading.Thread(target=later).start()
        with pytest.raises(openai.InternalServerError, match="not drawn within 60 seconds") as caught:
            server.client(max_retries=5).images.generate(prompt="")
        assert caught.value.status_code == 504 and caught.value.code == "timeout"
        assert server.batch.running == 0
