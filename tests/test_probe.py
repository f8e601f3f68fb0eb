"""Probes: what they read, that they find what is there and nothing else, and what the command line says."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, random_weights
from PIL import Image
from typer.testing import CliRunner

from fastigpt import ImageGPT, Palette
from fastigpt.cli import app, main
from fastigpt.probe import accuracy, plot, probe, split, table
from fastigpt.probe_data import load

PALETTE = Palette(np.random.default_rng(2).uniform(-1, 1, (9, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def model() -> ImageGPT:
    return ImageGPT(TINY, random_weights(TINY), palette=PALETTE, backend="portable")


def bright_and_dark(n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = np.arange(n) % 2
    return (rng.integers(0, 100, (n, 4, 4, 3)) + 150 * y[:, None, None, None]).astype(np.uint8), y


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    x, y = bright_and_dark()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return tmp_path / "data.npz"


# --- probing -----------------------------------------------------------------------------------------------------


def test_every_class_is_in_every_part_and_every_image_in_one():
    classes = np.array([0] * 3 + [1] * 10 + [2] * 40)
    parts = split(classes, seed=1)
    assert sorted(np.concatenate(parts)) == list(range(53))
    assert [np.bincount(classes[part]).tolist() for part in parts] == [[1, 6, 24], [1, 2, 8], [1, 2, 8]]
    assert any(not np.array_equal(a, b) for a, b in zip(parts, split(classes, seed=2)))


def test_accuracy_is_that_of_the_test_images_alone():
    """Labels that are noise except on the training images: a probe that is judged on those would look perfect."""
    rng = np.random.default_rng(0)
    classes = np.arange(300) % 2
    parts = split(classes, seed=0)
    inputs = rng.normal(size=(300, 200)).astype(np.float32)
    assert 0.3 < accuracy(inputs, classes, parts) < 0.7
    inputs[:, 7] += 1000 * classes
    assert accuracy(inputs, classes, parts) == 1


def test_probes_find_what_is_there_at_every_layer(model, archive, tmp_path):
    data = load(str(archive), 100, 4, 4)
    (found,) = probe(model, data)
    assert (found.fact, found.n_classes, found.n_train, found.n_test) == ("class", 2, 48, 12)
    assert len(found.trained) == len(found.untrained) == TINY.n_layer + 1
    assert found.pixels == 1 and min(found.trained) > 0.9 and found.commonest == 0.5
    assert probe(model, data) == [found]
    text = table([found])
    assert f"| layer 2 | {100 * found.trained[2]:.1f} ({100 * found.untrained[2]:.1f}) |" in text
    plot(tmp_path / "plot.png", [found])
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size[0] > 100


def test_probes_find_nothing_where_nothing_is(model):
    data = load("digits", 200, 4, 4)
    shuffled = np.random.default_rng(0).permutation(data.labels["digit"]).tolist()
    (found,) = probe(model, type(data)(data.name, data.pixels, {"digit": shuffled}))
    assert max(found.trained + found.untrained + (found.pixels,)) < 0.35


def test_features_of_a_layer_are_those_of_the_model(model, archive):
    """A model whose last layer's norm hides everything: its probe there sees no more than a guess does."""
    weights = random_weights(TINY)
    weights["transformer.ln_f.weight"] = weights["transformer.ln_f.weight"] * 0
    blind = ImageGPT(TINY, weights, palette=PALETTE, backend="portable")
    (found,) = probe(blind, load(str(archive), 100, 4, 4))
    assert found.trained[-1] == 0.5 and min(found.trained[:-1]) > 0.9 and found.untrained[-1] > 0.9


# --- data --------------------------------------------------------------------------------------------------------


def test_digits_are_read_as_images():
    data = load("digits", 100, 8, 8)
    assert data.pixels.shape == (100, 8, 8, 3) and data.pixels.dtype == np.uint8 and data.pixels.max() == 255
    assert set(data.labels["digit"]) == set("0123456789")
    assert load("digits", 5000, 16, 8).pixels.shape == (1797, 16, 8, 3)


def test_scenes_have_a_probe_for_each_fact_and_know_which_scenes_lack_it():
    data = load("scenes", 400, 32, 32)
    assert {"sky", "ground", "kind", "color", "size", "side", "relation"} <= data.labels.keys()
    assert None not in data.labels["sky"] and 0 < data.labels["side"].count(None) < 400
    assert all((a is None) != (b is None) for a, b in zip(data.labels["side"], data.labels["relation"]))


def test_a_folder_of_folders_is_read_whatever_the_images_are(tmp_path):
    for name, value in (("cats", 10), ("dogs", 200)):
        (tmp_path / name / "more").mkdir(parents=True)
        for k, mode in enumerate(("RGB", "L", "RGBA", "P")):
            Image.new("L", (7 + k, 9), value).convert(mode).save(tmp_path / name / "more" / f"{k}.png")
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    data = load(str(tmp_path), 100, 4, 6)
    assert data.pixels.shape == (8, 4, 6, 3) and data.labels == {"class": ["cats"] * 4 + ["dogs"] * 4}
    assert data.pixels[:4].max() < 50 and data.pixels[4:].min() > 150
    picked = load(str(tmp_path), 7, 4, 6, seed=1)
    assert len(picked.pixels) == 7 and sorted(picked.labels["class"]) == picked.labels["class"]


def test_grey_arrays_become_colour(tmp_path):
    x, y = bright_and_dark()
    np.savez(tmp_path / "grey.npz", x=x[..., 0], y=y)
    data = load(str(tmp_path / "grey.npz"), 100, 4, 4)
    assert np.array_equal(data.pixels, x[..., :1].repeat(3, -1))


def test_channels_and_labels_may_have_an_axis_of_their_own(tmp_path):
    x, y = bright_and_dark()
    grey = x[..., 0]
    for form in (grey, grey[..., None], grey[..., None].repeat(3, -1)):
        np.savez(tmp_path / "a.npz", x=form, y=y[:, None])
        found = load(tmp_path / "a.npz", 100, 4, 4)
        assert np.array_equal(found.pixels, grey[..., None].repeat(3, -1))
        assert found.labels == {"class": [str(label) for label in y]}
    wide = np.repeat(grey, 2, 2)
    np.savez(tmp_path / "a.npz", x=wide[:, None], y=y)
    assert np.array_equal(load(tmp_path / "a.npz", 100, 4, 8).pixels, wide[..., None].repeat(3, -1))
    hidden = np.concatenate([x, np.zeros_like(x[..., :1])], -1)
    np.savez(tmp_path / "a.npz", x=hidden, y=y)
    assert (load(tmp_path / "a.npz", 100, 4, 4).pixels == 255).all()


def hostile(header: str, held: int) -> bytes:
    """An .npy file that says more of itself than it holds."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(held)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (hostile("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 100)}", 8), "should hold 1000"),
        (hostile("{'descr': '|u1', 'fortran_order': False, 'shape': (-6, 8, 8)}", 384), "should hold -384"),
        (hostile("{'descr': '|O', 'fortran_order': False, 'shape': (6,)}", 48), "Python objects"),
        (hostile("{'descr': '|u1', 'fortran_order': False, 'shape': (6, 8", 384), "hostile.npz"),
        (hostile("{'descr': '|u1', 'shape': (6, 8, 8)}", 384), "hostile.npz"),
        (b"\x93NUMPY\x09\x00", r"x is of \.npy version \(9, 0\)"),
        (b"", "hostile.npz"),
    ],
)
def test_hostile_archives_are_named_before_memory_is_taken(tmp_path, x, says):
    path = tmp_path / "hostile.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", x)
        archive.writestr("y.npy", hostile("{'descr': '<i8', 'fortran_order': False, 'shape': (6,)}", 48))
    with pytest.raises(ValueError, match=r"hostile\.npz") as error:
        load(path, 100, 8, 8)
    assert error.match(says)


def test_bad_data_is_named(tmp_path):
    x, y = bright_and_dark()

    def refused(match: str, name: str = "bad.npz", **arrays: np.ndarray) -> None:
        if arrays:
            np.savez(tmp_path / name, **arrays)
        with pytest.raises(ValueError, match=match):
            load(str(tmp_path / name), 100, 4, 4)

    refused("no such folder", "nothing")
    refused("no such folder", "nothing.png")
    refused("class has 1 class", x=x, y=y * 0)
    refused("5 images of 4 classes, but 1 of class '1'", x=x[:5], y=np.array([0, 0, 1, 2, 3]))
    refused("has no y; found x, labels", x=x, labels=y)
    refused("x must be uint8", x=x / 255, y=y)
    refused("x must be uint8", x=x[..., :2], y=y)
    refused("x must be uint8", x=x[:0], y=y[:0])
    refused(r"y must be int \[60\]", x=x, y=y[:50])
    refused(r"y must be int \[60\]", x=x, y=y / 2)
    refused("bad.npz", x=np.array([object()]), y=y)
    (tmp_path / "torn.npz").write_bytes((tmp_path / "bad.npz").read_bytes()[:50])
    refused("torn.npz", "torn.npz")
    (tmp_path / "text").write_text("hello")
    refused("neither a folder nor", "text")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    refused("no subfolder holds images", "empty")
    (tmp_path / "empty" / "class" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    refused("cannot read the image .*a.png", "empty")


# --- command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(model: ImageGPT, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_command_prints_a_table_and_draws_a_plot(tiny, archive, tmp_path):
    command = ["probe", str(archive), "--model", str(tiny), "--out", str(tmp_path / "plot.png")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0 and "| layer 2 |" in result.output and "60 images of data" in result.output
    with Image.open(tmp_path / "plot.png") as picture:
        picture.load()
    result = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    figures = json.loads(result.output)
    assert figures["n"] == 60 and figures["model"] == str(tiny) and len(figures["probes"][0]["trained"]) == 3


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["digits", "-n", "12"], ["digits", "--out", "plot.txt"], ["digits", "--out", "no/p.png"]]
)
def test_what_is_wrong_is_one_line(arguments, tiny, monkeypatch, capsys):
    monkeypatch.chdir(tiny)
    monkeypatch.setattr(sys, "argv", ["fastigpt", "probe", *arguments, "--model", str(tiny)])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error:") and arguments[-1] in error
