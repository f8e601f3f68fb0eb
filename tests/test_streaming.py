"""stream: the rows of fill, in a thread that ends with its reader."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import PROMPTED, TINY, random_tokens, random_weights

from fastigpt import ImageGPT, ImageGPTConfig
from fastigpt.engine import loop
from fastigpt.prompts import Vocabulary
from fastigpt.streaming import AHEAD, RowStream

TALL = ImageGPTConfig(n_layer=1, n_head=2, n_embd=8, height=3 * AHEAD, width=2, n_colors=5)


@pytest.fixture
def model(backend: str) -> ImageGPT:
    return ImageGPT(TINY, random_weights(TINY), backend=backend)


def canvas(rows, config: ImageGPTConfig, n: int) -> torch.Tensor:
    """The tokens of a stream put together; every cell must come exactly once."""
    tokens = torch.full((n, config.height, config.width), -1)
    for images, row, line in rows:
        assert line.dtype == torch.int64 and line.shape == (len(images), config.width)
        assert (tokens[images.start : images.stop, row] == -1).all()
        tokens[images.start : images.stop, row] = line
    return tokens.flatten(1)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastigpt.stream"]


def test_rows_are_those_of_sample_and_fill(model):
    sampled = model.sample(5, seed=3, temperature=0.8, output_type="tokens")
    assert torch.equal(canvas(model.stream(5, seed=3, temperature=0.8), TINY, 5), sampled)
    assert torch.equal(canvas(model.stream(5, seed=3, temperature=0.8, batch_size=2), TINY, 5), sampled)
    known = random_tokens(TINY, 4).masked_fill(torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) < 0.5, -1)
    filled = model.fill(known, seed=9, first_index=7)
    assert torch.equal(canvas(model.stream(known, seed=9, first_index=7), TINY, 4), filled)
    assert torch.equal(canvas(model.stream(known.numpy(), seed=9, first_index=7), TINY, 4), filled)


def test_a_stream_says_which_seed_it_drew(model):
    rows = model.stream(2)
    tokens = canvas(rows, TINY, 2)
    assert torch.equal(tokens, model.sample(2, seed=rows.seed, output_type="tokens"))


def test_prompts_are_followed(backend):
    vocabulary = Vocabulary(("<pad>", "a", "red", "house", "tree"), 3)
    model = ImageGPT(PROMPTED, random_weights(PROMPTED), vocabulary=vocabulary, backend=backend)
    arguments = {"prompt": ["a tree", "red"], "guidance_scale": 2.0, "seed": 0}
    expected = model.fill(torch.full((2, 16), -1), **arguments)
    assert torch.equal(canvas(model.stream(2, **arguments), PROMPTED, 2), expected)


def test_rows_come_while_the_job_runs(backend):
    model = ImageGPT(TALL, random_weights(TALL), backend=backend)
    with model.stream(1, seed=0) as rows:
        assert next(rows)[1] == 0
        assert workers()  # the queue holds fewer rows than the canvas has, so the work cannot be over
    assert not workers()


def test_the_work_pauses_when_nobody_reads():
    asked: list[int] = []

    def work(on_row):
        for row in range(10 * AHEAD):
            asked.append(row)
            on_row(range(1), row, torch.zeros(1, 1, dtype=torch.int64))

    rows = RowStream(work, 0)
    deadline = time.monotonic() + 300
    while len(asked) <= AHEAD and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(asked) == AHEAD + 1
    assert [row for _, row, _ in rows] == list(range(10 * AHEAD))


@pytest.mark.parametrize("how", ["close", "with", "drop", "other thread"])
def test_closing_ends_the_work_at_the_next_row(how):
    asked, closed = [], []

    def work(on_row):
        try:
            for row in range(10 * AHEAD):
                asked.append(row)
                on_row(range(1), row, torch.zeros(1, 1, dtype=torch.int64))
        finally:
            closed.append(True)

    rows = RowStream(work, 0)
    next(rows)
    if how == "with":
        with rows:
            pass
    elif how == "other thread":
        closer = threading.Thread(target=rows.close)
        closer.start()
        closer.join()
    elif how == "close":
        rows.close()
        rows.close()
    else:
        del rows
        gc.collect()
    assert closed and len(asked) <= AHEAD + 3 and not workers()
    if how != "drop":
        assert list(rows) == []


def test_a_reader_that_waits_is_woken_by_close():
    go = threading.Event()

    def work(on_row):
        go.wait(10)
        on_row(range(1), 0, torch.zeros(1, 1, dtype=torch.int64))

    rows, found = RowStream(work, 0), []
    reader = threading.Thread(target=lambda: found.extend(rows))
    reader.start()
    threading.Timer(0.05, go.set).start()
    rows.close()
    reader.join(5)
    assert not reader.is_alive() and found == []


def test_errors_of_the_work_reach_the_reader(model, monkeypatch):
    def broken(engine, requests, on_row=None, **how):
        on_row(range(2), 0, torch.zeros(2, 4, dtype=torch.int64))
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(loop, "run", broken)
    rows = model.stream(2)
    assert next(rows)[1] == 0
    with pytest.raises(RuntimeError, match="the device is gone"):
        next(rows)
    assert list(rows) == [] and not workers()


@pytest.mark.parametrize(
    ("tokens_or_n", "arguments", "error", "word"),
    [
        (0, {}, ValueError, "tokens_or_n"),
        (2.0, {}, TypeError, "tokens_or_n"),
        (torch.full((1, 15), -1), {}, ValueError, "16 tokens"),
        (np.zeros((1, 16), np.int32), {}, TypeError, "int32"),
        (1, {"temperature": -1}, ValueError, "temperature"),
        (1, {"window": 0}, ValueError, "window"),
        (1, {"batch_size": 0}, ValueError, "batch_size"),
        (1, {"prompt": "a house"}, ValueError, "reads no text"),
    ],
)
def test_impossible_arguments_are_refused_before_any_work(model, tokens_or_n, arguments, error, word):
    with pytest.raises(error, match=word):
        model.stream(tokens_or_n, **arguments)
    assert not workers()


def test_four_threads_stream_and_sample_from_one_model_at_once(model):
    expected = {seed: model.sample(6, seed=seed, output_type="tokens") for seed in range(8)}
    found: dict[int, torch.Tensor] = {}
    start = threading.Barrier(4)

    def work(thread: int) -> None:
        start.wait()
        for seed in (thread, thread + 4):
            if seed % 2:
                found[seed] = canvas(model.stream(6, seed=seed), TINY, 6)
            else:
                found[seed] = model.sample(6, seed=seed, output_type="tokens")

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[seed], expected[seed]) for seed in expected)


def test_four_streams_read_in_turns_do_not_mix(model):
    streams = [model.stream(3, seed=seed) for seed in range(4)]
    parts: list[list] = [[] for _ in streams]
    for rows in zip(*streams):
        for part, row in zip(parts, rows):
            part.append(row)
    for seed, part in enumerate(parts):
        assert torch.equal(canvas(part, TINY, 3), model.sample(3, seed=seed, output_type="tokens"))


def test_a_program_may_end_in_the_middle_of_a_stream():
    code = (
        "import torch\n"
        "from fastigpt.streaming import RowStream\n"
        "def work(on_row):\n"
        "    for row in range(1000): on_row(range(1), row, torch.zeros(1, 1))\n"
        "rows = RowStream(work, 0)\n"
        "next(rows)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
