"""What operators rely on: health, metrics, keys, limits, logs, who leaves and how it ends."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from live import Live, live, pixels, records
from served_models import Gate, tiny_model

from fastigpt.cli.serve import named_models
from fastigpt.server import logs
from fastigpt.server.keys import Keys, make_key
from fastigpt.server.run import Address, Server, check_exposure, listen, load_models, serve
from fastigpt.server.service import Service, Settings


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


# --- starting and ending -----------------------------------------------------------------------------------------


def test_models_are_named_by_the_operator():
    assert named_models(["scenes"], "scenes") == {"scenes": None}
    assert named_models(["a=x/y=z", "openai/imagegpt-small", "scenes"], "scenes") == {
        "a": "x/y=z",
        "openai/imagegpt-small": "openai/imagegpt-small",
        "scenes": None,
    }
    for wrong in (["a=x", "a=y"], ["=x"], ["a="]):
        with pytest.raises(ValueError, match="--model"):
            named_models(wrong, "scenes")


def test_an_alias_must_be_of_a_model_that_is_there():
    from fastigpt.server.batch import Batch
    from fastigpt.server.served import Served

    served = [Served("tiny", model := tiny_model(), Batch(model))]
    for aliases, message in (({"a": "b"}, "there is tiny, no b"), ({"tiny": "tiny"}, "has the name tiny itself")):
        with pytest.raises(ValueError, match=message):
            Service(served, Settings(aliases=aliases))


def test_a_batch_that_would_never_take_ten_images_is_refused():
    with pytest.raises(ValueError, match="--batch-size, --max-queue"):
        load_models({"scenes": None}, {}, {"capacity": 1, "max_queue": 8})


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded():
    with listen(Address(port=0)) as bound:
        bound.listen()
        with pytest.raises(OSError, match="cannot listen on"):
            listen(Address(port=bound.getsockname()[1]))


def test_whoever_reads_where_it_listens_can_connect(monkeypatch, capsys):
    def connect(_: Server, sockets: list[socket.socket]) -> None:
        where = sockets[0].getsockname()
        assert f"http://127.0.0.1:{where[1]}/v1" in capsys.readouterr().out
        socket.create_connection(where, timeout=60).close()

    monkeypatch.setattr(Server, "run", connect)
    monkeypatch.setattr(logs, "configure", lambda: None)
    assert serve({"scenes": None}, Address(port=0), Settings(), loading={}, batches={"capacity": 1}) == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes a while: seconds, so that a test is in the middle of it."""
    from dataclasses import replace

    from conftest import random_weights

    import fastigpt
    from fastigpt import ImageGPT

    model = fastigpt.load()
    config = replace(model.config, n_layer=4)
    folder = tmp_path_factory.mktemp("models") / "slow"
    ImageGPT(config, random_weights(config), palette=model.palette, vocabulary=model.vocabulary).save_pretrained(folder)
    return folder


def test_draining_in_the_middle_of_a_stream():
    """It is finished; meanwhile nobody new is let in, and /readyz says so."""
    model = tiny_model()
    gate = Gate(model)
    with live(model) as server, gate.closed():
        gate.let(13)
        events = iter(server.client().images.generate(prompt="", stream=True, partial_images=1))
        next(events)
        draining = threading.Thread(target=server.service.drain)
        draining.start()
        while server.get("/readyz").status_code == 200:  # the thread has not begun
            pass
        assert server.get("/healthz").status_code == 200
        with pytest.raises(openai.InternalServerError) as caught:
            server.client().images.generate(prompt="")
        assert caught.value.code == "server_shutting_down" and caught.value.status_code == 503
        gate.let_all()
        assert next(events).type == "image_generation.completed"
        draining.join(60)


@pytest.mark.slow
def test_sigterm_in_the_middle_of_a_stream(checkpoint):
    """As above, and the process ends with status 0."""
    command = [sys.executable, "-P", "-m", "fastigpt", "serve", "--port", "0", "--model", f"slow={checkpoint}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            url = re.search(r"serving slow at (http://127.0.0.1:\d+); clients take base_url=\1/v1", line)
            assert url, line
            with httpx2.Client(base_url=url[1], timeout=120) as watcher:
                client = openai.OpenAI(base_url=f"{url[1]}/v1", api_key="none", max_retries=0)
                assert watcher.get("/readyz").status_code == 200
                events = iter(
                    client.images.generate(prompt="", n=10, stream=True, partial_images=3, extra_body={"seed": 1})
                )
                first = next(events)
                process.send_signal(signal.SIGTERM)
                while (ready := watcher.get("/readyz")).status_code == 200:  # it has not heard the signal yet
                    pass
                assert ready.status_code == 503 and watcher.get("/healthz").status_code == 200
                with pytest.raises(openai.InternalServerError) as caught:
                    client.images.generate(prompt="")
                assert caught.value.code == "server_shutting_down" and caught.value.status_code == 503
                finished = [event for event in [first, *events] if event.type.endswith("completed")]
            told = process.stderr.read()
            assert process.wait(120) == 0, told
        finally:
            process.kill()
    import fastigpt

    expected = fastigpt.load(checkpoint).sample(10, seed=1, output_type="np")
    assert np.array_equal([pixels(event.b64_json) for event in finished], expected)
    assert all(json.loads(line)["event"] for line in told.splitlines())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--model", "a=/nowhere/at/all"], "/nowhere/at/all"),
        (["--alias", "x"], "--alias must be NAME=VALUE"),
        (["--keys", "/nowhere"], "--keys /nowhere"),
        (["--moderation", "nonsense"], "--moderation must be module:function"),
        (["--moderation", "os:nothing"], "has no attribute"),
        (["--blocked-words", "/nowhere"], "--blocked-words /nowhere"),
        (["--timeout", "0"], "time limit above 0"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(arguments, message, capsys, monkeypatch):
    from fastigpt.cli import main

    monkeypatch.setattr(sys, "argv", ["fastigpt", "serve", "--port", "0", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr().err
    assert stop.value.code == 2 and message in told and told.count("\n") == 1


def test_a_key_is_made_and_its_digest_told(capsys, monkeypatch):
    from fastigpt.cli import main

    monkeypatch.setattr(sys, "argv", ["fastigpt", "serve", "--make-key"])
    with pytest.raises(SystemExit) as stop:
        main()
    key, digest = (line.split(": ")[1] for line in capsys.readouterr().out.splitlines())
    assert not stop.value.code and hashlib.sha256(key.encode()).hexdigest() == digest
