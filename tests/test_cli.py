"""The command line: what it writes, and that whatever is wrong ends in one line and exit status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from conftest import TINY, random_weights
from PIL import Image
from typer.testing import CliRunner

import fastigpt
from fastigpt import ImageGPT, Palette
from fastigpt.cli import app, main


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A checkpoint that draws in milliseconds."""
    palette = Palette(np.random.default_rng(2).uniform(-1, 1, (9, 3)).astype(np.float32))
    ImageGPT(TINY, random_weights(TINY), palette=palette, backend="portable").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.fromarray(skimage.data.coffee()).save(path)
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a person sees on stderr: one line; the exit status is 2."""
    monkeypatch.setattr(sys, "argv", ["fastigpt", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error:") and "Traceback" not in error
    return error


def test_sample_writes_a_grid_that_tells_how_to_draw_it_again(tiny, tmp_path):
    out = tmp_path / "s.png"
    text = run("sample", "-n", 5, "--seed", 7, "--model", tiny, "--out", out, "--scale", 1)
    assert "seed 7" in text and str(out) in text
    with Image.open(out) as sheet:
        assert sheet.size == (3 * 6 + 2, 2 * 6 + 2)
        assert sheet.info["seed"] == "7" and sheet.info["model"] == str(tiny)
        pixels = np.asarray(sheet)
    images = fastigpt.load(tiny).sample(5, seed=7, output_type="np")
    assert np.array_equal(pixels[2:6, 2:6], images[0]) and np.array_equal(pixels[8:12, 8:12], images[4])


def test_sample_writes_arrays_and_folders(tiny, tmp_path):
    images = fastigpt.load(tiny).sample(3, seed=1, first_index=2, output_type="np")
    run("sample", "-n", 3, "--seed", 1, "--first-index", 2, "--model", tiny, "--out", tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as archive:
        assert list(archive) == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8 and np.array_equal(archive["arr_0"], images)
    run("sample", "-n", 3, "--seed", 1, "--first-index", 2, "--model", tiny, "--out", tmp_path / "folder")
    names = sorted(p.name for p in (tmp_path / "folder").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png"]
    for name, image in zip(names, images):
        with Image.open(tmp_path / "folder" / name) as picture:
            assert np.array_equal(np.asarray(picture), image)


def test_sample_prints_figures_as_json(tiny, tmp_path):
    facts = json.loads(run("sample", "-n", 2, "--seed", 3, "-m", tiny, "--out", tmp_path / "s.png", "--json"))
    assert facts["seed"] == 3 and facts["images"] == 2 and facts["images_per_second"] > 0


def test_the_window_does_not_change_the_images(tiny, tmp_path):
    for window in ("1", "4", "auto"):
        run("sample", "-n", 4, "--seed", 1, "-m", tiny, "--window", window, "--out", tmp_path / f"{window}.npz")
    arrays = [np.load(tmp_path / f"{window}.npz")["arr_0"] for window in ("1", "4", "auto")]
    assert np.array_equal(arrays[0], arrays[1]) and np.array_equal(arrays[0], arrays[2])


def test_sample_draws_a_heat_map_of_its_passes(tiny, tmp_path):
    out, picture = tmp_path / "s.npz", tmp_path / "passes.png"
    run("sample", "-n", 4, "-m", tiny, "--out", out, "--window", 4, "--heat-map", picture)
    with Image.open(picture) as image:
        assert image.width > 300 and len(image.convert("L").getcolors()) > 10


def test_pictures_that_need_matplotlib_say_so_before_any_work(monkeypatch, capsys, tiny, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as Python marks a module that must not be found
    out = tmp_path / "s.png"
    arguments = ["sample", "-n", 1, "-m", tiny, "--out", out, "--heat-map", tmp_path / "h.png"]
    assert "pip install matplotlib" in fail(monkeypatch, capsys, *arguments)
    assert not out.exists()


def test_complete_shows_original_kept_and_results(tiny, photo, tmp_path):
    out = tmp_path / "c.png"
    run("complete", photo, "-n", 3, "--rows", 2, "--seed", 0, "-m", tiny, "--out", out, "--scale", 1)
    model = fastigpt.load(tiny)
    original = model.decode(model.encode(Image.open(photo)))[0]
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (8, 5 * 6 + 2, 3)
    cells = [pixels[2:6, 2 + 6 * i : 6 + 6 * i] for i in range(5)]
    assert np.array_equal(cells[0], original)
    assert np.array_equal(cells[1][:2], original[:2]) and (cells[1][2:] == 128).all()
    for i, result in enumerate(model.complete(Image.open(photo), 3, rows=2, seed=0, output_type="np")):
        assert np.array_equal(cells[2 + i], result)


def test_complete_reads_a_mask_and_writes_results_alone_to_npz(tiny, photo, tmp_path):
    mask = np.zeros((4, 4), np.uint8)
    mask[1:3, 1:3] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    run("complete", photo, "-n", 2, "--mask", tmp_path / "mask.png", "-m", tiny, "--out", tmp_path / "c.npz")
    results = np.load(tmp_path / "c.npz")["arr_0"]
    model = fastigpt.load(tiny)
    original = model.decode(model.encode(Image.open(photo)))[0]
    assert results.shape == (2, 4, 4, 3)
    assert (results[:, mask == 0] == original[mask == 0]).all()


def test_info_tells_backends_versions_and_the_bundled_model():
    facts = json.loads(run("info", "--json"))
    assert facts["backends"]["reference"] == facts["backends"]["portable"] == "available"
    assert facts["auto"] in facts["backends"] and facts["versions"]["torch"]
    text = run("info")
    assert "← auto" in text and "bundled model" in text


@pytest.mark.parametrize("command", ["sample", "complete", "info", "convert", "train"])
def test_every_command_has_help(command):
    assert "Usage" in run(command, "--help")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["sample", "-n", "0"], "n must be at least 1"),
        (["sample", "--temperature", "-1"], "temperature"),
        (["sample", "--temperature", "nan"], "temperature"),
        (["sample", "--top-p", "2"], "top_p"),
        (["sample", "--window", "wide"], "window"),
        (["sample", "--window", "-1"], "window"),
        (["sample", "--backend", "turbo"], "turbo"),
        (["sample", "--dtype", "float7"], "float7"),
        (["sample", "--model", "/no/such/folder"], "/no/such/folder"),
        (["sample", "--out", "/no/such/folder/s.png"], "/no/such/folder"),
        (["sample", "--out", "s.txt"], "s.txt"),
        (["complete", "/no/such/photo.jpg", "--rows", "3"], "/no/such/photo.jpg"),
        (["complete", "{photo}", "--rows", "99"], "rows"),
        (["complete", "{photo}"], "rows="),
        (["complete", __file__, "--rows", "1"], "cannot read the image"),
        (["convert", "/no/model.ckpt", "--palette", "/no/p.npy", "--out", "{tmp}/m"], ""),
    ],
)
def test_errors_are_one_line_and_nothing_is_left_behind(monkeypatch, capsys, tmp_path, tiny, photo, arguments, word):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    arguments = [a.format(photo=photo, tmp=tmp_path) for a in arguments]
    if "--model" not in arguments and arguments[0] != "convert":
        arguments += ["--model", str(tiny)]
    assert word in fail(monkeypatch, capsys, *arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_a_write_that_fails_leaves_the_old_file(monkeypatch, capsys, tiny, tmp_path):
    out = tmp_path / "s.png"
    out.write_text("old")

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    assert "No space" in fail(monkeypatch, capsys, "sample", "-n", 1, "-m", tiny, "--out", out)
    assert out.read_text() == "old" and {p.name for p in tmp_path.iterdir()} == {"tiny", "s.png"}


def test_the_installed_command_starts():
    result = subprocess.run(
        [sys.executable, "-m", "fastigpt.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "sample" in result.stdout and "complete" in result.stdout
