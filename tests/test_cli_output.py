"""Where `fastigpt sample` and `complete` write: as images are finished, whole at any time, never two jobs in one."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, random_weights
from PIL import Image
from typer.testing import CliRunner

import fastigpt
from fastigpt import ImageGPT, Palette, signals
from fastigpt.cli import app, chunks, main


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that draws in milliseconds, in the working directory."""
    palette = Palette(np.random.default_rng(2).uniform(-1, 1, (9, 3)).astype(np.float32))
    ImageGPT(TINY, random_weights(TINY), palette=palette, backend="portable").save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tiny"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are drawn in chunks of four images."""
    monkeypatch.setattr(chunks, "FIRST_CHUNK", 4)
    monkeypatch.setattr(chunks, "LEAST_CHUNK", 4)
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 0.0)


def run(*arguments: object, status: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["fastigpt", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    return capsys.readouterr().err


def read(path: Path | io.BytesIO) -> np.ndarray:
    with np.load(path) as archive:
        assert list(archive) == ["arr_0"]
        return archive["arr_0"]


def stop_after(count: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process gets a signal while it draws the chunk after `count` images."""
    fill: Callable[..., Any] = ImageGPT.fill
    done = 0

    def stopped(model: ImageGPT, tokens: torch.Tensor, **options: Any) -> Any:
        nonlocal done
        if done == count:
            os.kill(os.getpid(), number)
        done += len(tokens)
        return fill(model, tokens, **options)

    monkeypatch.setattr(ImageGPT, "fill", stopped)


@pytest.mark.parametrize("first_index", [0, 7])
def test_a_job_in_chunks_is_the_job(tiny, small_chunks, first_index):
    expected = fastigpt.load(tiny).sample(10, seed=1, first_index=first_index, output_type="np")
    for out in ("all.npz", "all"):
        run("sample", "-n", 10, "-m", tiny, "--seed", 1, "--first-index", first_index, "--out", out, "--batch-size", 3)
    assert np.array_equal(read(Path("all.npz")), expected)
    names = sorted(os.listdir("all"))
    assert names == [f"{i:05d}.png" for i in range(10)]
    for name, image in zip(names, expected):
        with Image.open(f"all/{name}") as picture:
            assert np.array_equal(np.asarray(picture), image)
    run("sample", "-n", 1, "-m", tiny, "--seed", 1, "--first-index", picture.info["index"], "--out", "again.npz")
    assert np.array_equal(read(Path("again.npz"))[0], expected[9])
    assert not list(Path().glob("*.partial"))


def test_completions_in_chunks_are_the_completions(tiny, small_chunks):
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(2)]
    for i, photo in enumerate(photos):
        photo.save(f"{i}.png")
    how = ("-n", 3, "--rows", 2, "--seed", 1, "--first-index", 5, "-m", tiny)
    run("complete", "0.png", "1.png", *how, "--out", "c.npz")
    expected = fastigpt.load(tiny).complete(photos, 3, rows=2, seed=1, first_index=5, output_type="np")
    assert np.array_equal(read(Path("c.npz")), expected)
    run("complete", "0.png", "1.png", *how, "--out", "c.png", "--scale", 1)
    with Image.open("c.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (2 * 6 + 2, 5 * 6 + 2, 3)
    assert np.array_equal(pixels[8:12, 2 + 4 * 6 : 6 + 4 * 6], expected[5])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("out", ["s.npz", "folder", "s.png"])
def test_an_interruption_keeps_what_is_finished_and_says_how_to_go_on(tiny, small_chunks, monkeypatch, out, number):
    whole = fastigpt.load(tiny).sample(12, seed=3, first_index=2, output_type="np")
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    stop_after(8, number, monkeypatch)
    arguments = ("sample", "-m", tiny, "--scale", 1)
    result = run(*arguments, "-n", 12, "--seed", 3, "--first-index", 2, "--out", out, status=128 + number)
    assert {s: signal.getsignal(s) for s in before} == before
    assert "8 images" in result.stderr and "--seed 3 --first-index 10" in result.stderr and "4 others" in result.stderr
    monkeypatch.undo()
    os.chdir(tiny.parent)
    if out == "s.npz":
        assert np.array_equal(read(Path(out)), whole[:8])
    elif out == "folder":
        assert len(os.listdir(out)) == 8
    else:
        with Image.open(out) as sheet:
            assert sheet.size == (3 * 6 + 2, 3 * 6 + 2)
    run(*arguments, "-n", 4, "--seed", 3, "--first-index", 10, "--out", "rest.npz")
    assert np.array_equal(read(Path("rest.npz")), whole[8:])
    assert {p.name for p in Path().iterdir()} == {"tiny", out, "rest.npz"}


@pytest.mark.parametrize("out", ["s.npz", "folder", "s.png"])
def test_an_interruption_before_the_first_image_leaves_nothing(tiny, small_chunks, monkeypatch, out):
    stop_after(0, signal.SIGINT, monkeypatch)
    assert "no image was finished" in run("sample", "-n", 9, "-m", tiny, "--out", out, status=130).stderr
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny"]


def test_a_signal_during_a_write_waits_for_its_end():
    with signals.stoppable() as stopping:
        with pytest.raises(signals.Interrupted), stopping.held():
            os.kill(os.getpid(), signal.SIGTERM)
            written = True
        assert written


def test_a_job_that_is_killed_leaves_an_array_that_numpy_reads(tiny, monkeypatch, capsys):
    program = """
import os, signal, sys
from fastigpt import ImageGPT
from fastigpt.cli import chunks, main
chunks.FIRST_CHUNK = chunks.LEAST_CHUNK = 4
chunks.CHUNK_SECONDS = 0.0
fill, drawn = ImageGPT.fill, []
def killed(*args, **options):
    drawn.append(1)
    if len(drawn) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return fill(*args, **options)
ImageGPT.fill = killed
main()
"""
    arguments = ["sample", "-n", "12", "--seed", "3", "-m", str(tiny), "--out", "s.npz"]
    result = subprocess.run([sys.executable, "-P", "-c", program, *arguments], check=False)
    assert result.returncode == -signal.SIGKILL and not Path("s.npz").exists()
    found = np.load("s.npz.partial")
    assert np.array_equal(found, fastigpt.load(tiny).sample(8, seed=3, output_type="np"))
    assert "s.npz.partial" in fail(monkeypatch, capsys, *arguments)
    assert np.array_equal(np.load("s.npz.partial"), found)
    os.remove("s.npz.partial")
    run(*arguments)
    assert len(read(Path("s.npz"))) == 12


def test_a_dash_is_standard_output_and_the_report_goes_elsewhere(tiny):
    expected = fastigpt.load(tiny).sample(4, seed=0, output_type="np")
    result = run("sample", "-n", 4, "--seed", 0, "-m", tiny, "--out", "-", "--scale", 1)
    with Image.open(io.BytesIO(result.stdout_bytes)) as sheet:
        assert sheet.format == "PNG" and sheet.info["seed"] == "0"
        assert np.array_equal(np.asarray(sheet)[2:6, 2:6], expected[0])
    assert "4 images" in result.stderr
    result = run("sample", "-n", 4, "--seed", 0, "-m", tiny, "--out", "-.npz", "--json")
    assert np.array_equal(read(io.BytesIO(result.stdout_bytes)), expected)
    assert '"images": 4' in result.stderr
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny"]


def test_bytes_are_not_written_to_a_terminal(tiny, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "terminal" in fail(monkeypatch, capsys, "sample", "-n", 1, "-m", tiny, "--out", "-")


def test_a_reader_that_leaves_early_is_no_error(tiny):
    reading, writing = os.pipe()
    os.close(reading)
    arguments = ["sample", "-n", "4", "-m", str(tiny), "--out", "-"]
    result = subprocess.run(
        [sys.executable, "-P", "-m", "fastigpt", *arguments],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert result.returncode == 1 and result.stderr == ""


@pytest.mark.parametrize(
    ("out", "word"),
    [("", "empty"), ("  ", "empty"), ("old", "3 pictures"), ("s.txt", "s.txt"), ("tiny/config.json", ".json")],
)
def test_outputs_that_cannot_be_are_refused_before_any_work(tiny, monkeypatch, capsys, out, word):
    run("sample", "-n", 3, "-m", tiny, "--out", "old")
    kept = {p.name: p.read_bytes() for p in Path("old").iterdir()}
    monkeypatch.setattr(ImageGPT, "fill", None)
    assert word in fail(monkeypatch, capsys, "sample", "-n", 4, "-m", tiny, "--out", out)
    assert {p.name: p.read_bytes() for p in Path("old").iterdir()} == kept


def test_a_folder_without_pictures_is_written_to_and_a_slash_means_a_folder(tiny):
    Path("notes.d").mkdir()
    Path("notes.d/readme.txt").write_text("mine")
    run("sample", "-n", 2, "-m", tiny, "--out", "notes.d")
    run("sample", "-n", 2, "-m", tiny, "--out", "v1.5/")
    assert sorted(os.listdir("notes.d")) == ["00000.png", "00001.png", "readme.txt"]
    assert len(os.listdir("v1.5")) == 2


@pytest.mark.parametrize(
    ("n", "out"),
    [(3_000_000, "s.png"), (10**11, "s.npz"), (10**18, "folder"), (10**30, "s.npz"), (3000, "s.webp"), (10**7, "-")],
)
def test_jobs_that_no_output_can_hold_are_refused_before_any_work(tiny, monkeypatch, capsys, n, out):
    monkeypatch.setattr(ImageGPT, "fill", None)
    error = fail(monkeypatch, capsys, "sample", "-n", n, "-m", tiny, "--out", out, "--scale", 64)
    assert "--out" in error and error.count("\n") == 1
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny"]


def test_memory_follows_the_batch_and_not_the_job(tiny, monkeypatch):
    """Python's and numpy's memory, which holds the pixels."""
    monkeypatch.setattr(chunks, "FIRST_CHUNK", 500)
    monkeypatch.setattr(chunks, "LEAST_CHUNK", 500)
    monkeypatch.setattr(chunks, "CHUNK_SECONDS", 0.0)

    def peak(n: int) -> int:
        tracemalloc.start()
        run("sample", "-n", n, "-m", tiny, "--out", f"{n}.npz")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(500)  # what is imported and kept
    few, many = peak(500), peak(4000)
    assert many - few < 4000 * TINY.n_pixels * 3 / 2


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "tokens"])
def test_results_in_python_that_cannot_be_held_are_refused(tiny, kind):
    with pytest.raises(ValueError, match=r"GB.*first_index"):
        fastigpt.load(tiny).sample(10**11, output_type=kind)


def test_a_job_in_python_is_handed_to_the_engine_in_chunks(tiny, monkeypatch):
    monkeypatch.setattr("fastigpt.chunks.MOST", 4)
    model = fastigpt.load(tiny)
    seen: list[tuple[range, int]] = []
    tokens, stats = model.fill(
        torch.full((10, 16), -1), seed=1, on_row=lambda some, row, _: seen.append((some, row)), return_stats=True
    )
    assert [some for some, row in seen if row == 0] == [range(4), range(4, 8), range(8, 10)]
    assert stats.pass_starts.shape == (10, 4, 4) and int(stats.drawn.sum()) == 160
    assert torch.equal(tokens, model.sample(10, seed=1, output_type="tokens", batch_size=10))
    for kind in ("np", "pt"):
        assert len(model.sample(10, seed=1, output_type=kind)) == 10
    pictures = model.sample(10, seed=1)
    assert [p.info["index"] for p in pictures] == [str(i) for i in range(10)]
    rows = [(some.start, row) for some, row, _ in model.stream(10, seed=1)]
    assert len(rows) == 12 and rows[-1] == (8, 3)
