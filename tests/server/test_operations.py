"""What operators rely on: health, metrics, keys, limits, logs and who leaves."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import socket
import threading
from typing import Any

import openai
import pytest
from live import Live, live, records
from served_models import Gate, tiny_model

from fastigpt.server import logs
from fastigpt.server.keys import Keys, make_key
from fastigpt.server.run import check_exposure
from fastigpt.server.service import Settings


def error(answer: Any) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-request-id"]
    return answer.json()["error"]


def test_health_and_metrics():
    with live() as server:
        assert server.get("/healthz").text == "ok\n" and server.get("/readyz").text == "ready\n"
        server.client().images.generate(prompt="", n=3)
        server.post("/v1/images/generations", json={})
        told = server.get("/metrics").text
        for line in (
            'fastigpt_requests_total{code="200",route="/v1/images/generations"} 1.0',
            'fastigpt_requests_total{code="400",route="/v1/images/generations"} 1.0',
            'fastigpt_images_total{model="tiny"} 3.0',
            'fastigpt_rows_total{model="tiny"} 18.0',
            'fastigpt_cancelled_total{model="tiny"} 0.0',
            'fastigpt_images_running{model="tiny"} 0.0',
            'fastigpt_images_waiting{model="tiny"} 0.0',
            'fastigpt_slots{model="tiny"} 4.0',
            "fastigpt_passes_count 3.0",
            "fastigpt_queue_seconds_count 1.0",
            "fastigpt_first_row_seconds_count 1.0",
            "fastigpt_draw_seconds_count 1.0",
            "fastigpt_sign_seconds_count 0.0",
        ):
            assert f"\n{line}\n" in told, line


# --- keys --------------------------------------------------------------------------------------------------------


def test_keys(tmp_path):
    key, digest = make_key()
    other, other_digest = make_key()
    assert key != other and len(key) > 40
    (tmp_path / "keys").write_text(f"# ours\n\n{digest} a name\n{other_digest.upper()}\n")
    with live(settings=Settings(keys=Keys.read(tmp_path / "keys"))) as server:
        for good in (key, other):
            assert server.client(api_key=good).images.generate(prompt="").data
        for wrong in ("none", key[:-1], digest, "é"):
            headers = {"authorization": b"Bearer " + wrong.encode()}
            answer = server.post("/v1/images/generations", json={"prompt": ""}, headers=headers)
            assert answer.status_code == 401 and error(answer)["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="none").images.generate(prompt="")
        for path in ("/v1/models", "/v1/models/tiny", "/openapi.json", "/elsewhere"):
            assert server.get(path).status_code == 401
            assert server.get(path, headers={"authorization": f"Basic {key}"}).status_code == 401
        for path in ("/healthz", "/readyz", "/metrics"):
            assert server.get(path).status_code == 200
        assert 'fastigpt_refused_total{why="key"}' in server.get("/metrics").text


def test_a_digest_is_sha_256_as_everybody_makes_it(tmp_path):
    (tmp_path / "keys").write_text(hashlib.sha256(b"secret").hexdigest())
    keys = Keys.read(tmp_path / "keys")
    assert keys.allow("Bearer secret") and keys.allow("bearer secret") and not keys.allow("Bearer secrets")
    assert not keys.allow(None) and not keys.allow("") and not keys.allow("secret") and not keys.allow("Bearer ")


@pytest.mark.parametrize(
    "text, message", [("", "holds no digest"), ("secret\n", "line 1: expected the SHA-256"), ("# \xff", "keys")]
)
def test_files_that_hold_no_keys_are_refused(tmp_path, text, message):
    (tmp_path / "keys").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        Keys.read(tmp_path / "keys")
    with pytest.raises(ValueError, match="No such file"):
        Keys.read(tmp_path / "nowhere")


def test_nobody_listens_to_the_world_without_keys_by_mistake():
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        check_exposure(host, keys=False, no_auth=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""):
        with pytest.raises(ValueError, match="--keys, or --no-auth"):
            check_exposure(host, keys=False, no_auth=False)
        check_exposure(host, keys=True, no_auth=False)
        check_exposure(host, keys=False, no_auth=True)


# --- limits ------------------------------------------------------------------------------------------------------


def send(server: Live, *parts: bytes) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    for part in parts:
        connection.sendall(part)
    return connection


def received(connection: socket.socket) -> tuple[int, str]:
    """Status and body of the answer, after which the server closes the connection."""
    with connection, connection.makefile("rb") as file:
        answer = file.read()
    return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2].decode()


HEAD = (
    b"POST /v1/images/edits HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    b"content-type: multipart/form-data; boundary=b\r\n"
)


def test_bodies_are_limited_whether_they_say_how_long_they_are_or_not():
    with live(settings=Settings(max_body=100_000)) as server:
        for body in (b"x" * 100_001, b"x" * 150_000):
            answer = server.post("/v1/images/edits", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 413 and error(answer)["code"] == "request_too_large"
            with pytest.raises(openai.APIStatusError) as caught:
                server.client().images.edit(image=body, prompt="")
            assert caught.value.status_code == 413
        declared = send(server, HEAD + b"content-length: 100000000000\r\n\r\n")  # and nothing of it comes
        assert received(declared)[0] == 413
        chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
        status, body_text = received(
            send(server, HEAD + b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 4, b"0\r\n\r\n")
        )
        assert status == 400 and "multipart" in json.loads(body_text)["error"]["message"].lower()  # it is no form
        form = b'--b\r\ncontent-disposition: form-data; name="image"; filename="x"\r\n\r\n'
        first = f"{len(form):x}\r\n".encode() + form + b"\r\n"
        status, body_text = received(
            send(server, HEAD + b"transfer-encoding: chunked\r\n\r\n", first, *[chunk] * 4, b"0\r\n\r\n")
        )
        assert status == 413 and json.loads(body_text)["error"]["code"] == "request_too_large"
        assert server.client().images.generate(prompt="").data
        assert 'fastigpt_refused_total{why="size"} 6.0' in server.get("/metrics").text


def test_an_answer_is_not_lost_over_a_body_that_nobody_reads(tmp_path):
    """A connection that is closed with something to read in it is reset, and takes the answer along."""
    (tmp_path / "keys").write_text(make_key()[1])
    with live(settings=Settings(keys=Keys.read(tmp_path / "keys"))) as server:
        for _ in range(5):
            with pytest.raises(openai.AuthenticationError):
                server.client(api_key="none").images.edit(image=b"x" * 3_000_000, prompt="")


def test_whoever_sends_too_slowly_is_told():
    with live(settings=Settings(body_patience=0.2)) as server:
        status, body = received(send(server, HEAD + b"content-length: 100\r\n\r\n--b\r\n"))
        assert status == 408 and json.loads(body)["error"]["code"] == "request_timeout"
        assert server.client().images.generate(prompt="").data


def test_whoever_leaves_in_the_middle_of_a_request_is_no_failure():
    with live() as server, records() as log:
        send(server, HEAD + b"content-length: 100\r\n\r\n--b\r\n").close()
        log.wait(lambda record: getattr(record, "status", 0) == 499)
        assert not [record for record in log.records if record.levelno >= logging.WARNING]


# --- who leaves --------------------------------------------------------------------------------------------------


def leave(server: Live, gate: Gate, stream: bool) -> None:
    """Asks for four images, and leaves when one is being drawn."""
    body = json.dumps({"prompt": "", "n": 4, "stream": stream, "partial_images": 3 if stream else 0}).encode()
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection = send(server, head + f"content-length: {len(body)}\r\n\r\n".encode() + body)
    gate.let(10)
    if stream:
        assert b"200 OK" in connection.recv(100)
    assert gate.stands.wait(60)
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_images_are_given_up_when_their_client_leaves(stream):
    model = tiny_model()
    gate = Gate(model)
    with live(model, capacity=2) as server, gate.closed():
        given_up, give_up = threading.Event(), server.batch._give_up
        server.batch._give_up = lambda ticket: (give_up(ticket), given_up.set())  # type: ignore[method-assign]
        leave(server, gate, stream)
        assert given_up.wait(60)
        gate.let_all()
        assert server.client().images.generate(prompt="").data
        assert (server.batch.counts.cancelled, server.batch.counts.images) == (4, 1)
        assert server.batch.running == server.batch.waiting == 0


@pytest.mark.parametrize("stream", [False, True])
def test_or_are_drawn_to_the_end_if_the_operator_wants_that(stream):
    model = tiny_model()
    gate = Gate(model)
    with (
        records() as log,
        live(model, capacity=2, settings=Settings(cancel_on_disconnect=False)) as server,
        gate.closed(),
    ):
        leave(server, gate, stream)
        if stream:
            log.wait(lambda record: getattr(record, "status", 0) == 200)
        gate.let_all()
        assert server.batch.drain(60)
        assert (server.batch.counts.cancelled, server.batch.counts.images) == (0, 4)


# --- logs --------------------------------------------------------------------------------------------------------


def test_the_log_is_json_and_tells_nothing_of_what_was_asked_for():
    with records() as log, live() as server:
        client = server.client()
        answer = client.images.generate(prompt="a red house", n=2, user="me", extra_body={"safety_identifier": "you"})
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt="a horse of mine")
        first = log.wait(lambda record: getattr(record, "status", 0) == 200)
        second = log.wait(lambda record: getattr(record, "status", 0) == 400)
    line = json.loads(logs.JsonLines().format(first))
    assert line["event"] == "request" and line["route"] == "/v1/images/generations" and line["images"] == 2
    assert line["request_id"] == answer._request_id and line["model"] == "tiny" and line["level"] == "info"
    assert (
        line["queue_seconds"] >= 0
        and line["draw_seconds"] >= 0
        and line["first_row_seconds"] > 0
        and line["seconds"] > 0
    )
    text = logs.JsonLines().format(first) + logs.JsonLines().format(second)
    assert not re.search('house|horse|mine|"me"|you|127.0.0.1', text)


def test_what_went_wrong_is_in_the_log():
    model = tiny_model()
    gate = Gate(model)
    with records() as log, live(model) as server:
        gate.error = RuntimeError("the device is gone")
        gate.let_all()
        with pytest.raises(openai.InternalServerError):
            server.client().images.generate(prompt="")
        record = log.wait(lambda record: record.levelno == logging.ERROR)
    assert "the device is gone" in json.loads(logs.JsonLines().format(record))["traceback"]
