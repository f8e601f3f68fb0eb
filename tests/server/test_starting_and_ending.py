"""How a server starts and how it ends: in order, in the middle of a stream, by kill -9."""

from __future__ import annotations

import hashlib
import json
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
from live import live, pixels
from served_models import Gate, tiny_model

from fastigpt.cli.serve import named_models
from fastigpt.server import logs
from fastigpt.server.run import Address, Server, listen, load_models, serve
from fastigpt.server.service import Service, Settings


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


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_stream_and_a_start_on_the_same_port(checkpoint, tmp_path):
    """The client is told, the same command serves again at once, and draws the picture that was lost."""
    with listen(Address(port=0)) as free:
        port = free.getsockname()[1]
    home = tmp_path / "home"
    command = [sys.executable, "-P", "-m", "fastigpt", "serve", "--port", str(port), "--model", f"slow={checkpoint}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_DATA_HOME": str(home)}
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"prompt": "", "n": 10, "extra_body": {"seed": 1}}

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None and "serving slow" in process.stdout.readline()
        return process

    def kept() -> dict[str, bytes]:
        return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*") if path.is_file()}

    with start() as process:
        events = iter(client.images.generate(**asked, stream=True, partial_images=3))
        next(events)
        before = kept()
        process.kill()
        with pytest.raises((openai.APIConnectionError, httpx2.RemoteProtocolError, httpx2.ReadError)):
            list(events)
        assert process.wait() == -signal.SIGKILL
    with start() as process:
        try:
            answer = client.images.generate(**asked)
        finally:
            process.kill()
    import fastigpt

    expected = fastigpt.load(checkpoint).sample(10, seed=1, output_type="np")
    assert np.array_equal([pixels(image.b64_json) for image in answer.data or []], expected)
    assert before and kept() == before


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
