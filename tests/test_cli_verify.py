"""`sample --c2pa`, `complete --c2pa` and `verify`: signed where pictures are written, checked where they arrive."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, random_weights
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("c2pa")

from fastigpt import ImageGPT, Palette
from fastigpt.cli import app, main

ISSUER = "issuer unknown (calls itself 'fastigpt (self-made certificate)')"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that draws in milliseconds in the working directory, and a data directory of its own."""
    palette = Palette(np.random.default_rng(2).uniform(-1, 1, (9, 3)).astype(np.float32))
    ImageGPT(TINY, random_weights(TINY), palette=palette, backend="portable").save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path / "tiny"


def run(*arguments: object, status: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["fastigpt", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    return error


def sample(tiny: Path, out: str, *more: object) -> None:
    run("sample", "-n", 3, "-m", tiny, "--seed", 5, "--first-index", 7, "--out", out, *more)


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_grid_is_signed_and_looks_the_same(tiny, suffix):
    sample(tiny, f"plain.{suffix}")
    sample(tiny, f"signed.{suffix}", "--c2pa")
    assert np.array_equal(pixels(f"plain.{suffix}"), pixels(f"signed.{suffix}"))
    told = run("verify", f"signed.{suffix}").stdout
    expected = f"valid, {ISSUER}: created by fastigpt 0.1.0, model tiny, seed 5, index 7, count 3"
    assert told == f"signed.{suffix}: {expected}\n"
    assert run("verify", f"plain.{suffix}", status=1).stdout == f"plain.{suffix}: no record of its origin\n"


def test_every_picture_of_a_folder_tells_its_own_index(tiny):
    sample(tiny, "folder/", "--c2pa")
    told = run("verify", *(f"folder/0000{i}.png" for i in range(3))).stdout.splitlines()
    assert [line.rpartition(", ")[2] for line in told] == ["index 7", "index 8", "index 9"]
    run("sample", "-n", 1, "-m", tiny, "--seed", 5, "--first-index", 8, "--out", "again/")
    assert np.array_equal(pixels("again/00000.png"), pixels("folder/00001.png"))


def test_the_prompt_and_the_place_of_a_model_stay_out(tiny):
    sample(tiny, "signed.png", "--c2pa")
    record = Path("signed.png").read_bytes()
    record = record[record.index(b"caBX") : record.index(b"tEXt")]
    assert b"fastigpt.model" in record and str(tiny.parent).encode() not in record


def test_completions_name_their_photographs(tiny):
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(f"{i}.png")
    how = ("-n", 2, "--rows", 2, "--seed", 1, "-m", tiny, "--c2pa")
    run("complete", "0.png", *how, "--out", "one.png")
    run("complete", "0.png", "1.png", *how, "--out", "two.png")
    run("complete", "0.png", "1.png", *how, "--out", "folder/")
    one, two, *folder = (
        line.partition(": edited" if ": edited" in line else ": created")[2]
        for line in run("verify", "one.png", "two.png", *(f"folder/0000{i}.png" for i in range(4))).stdout.splitlines()
    )
    made = " by fastigpt 0.1.0, model tiny, seed 1"
    photograph = "parent image/png without a record of its own"
    assert one == f"{made}, index 0, count 2, {photograph}"
    assert two == f"{made}, index 0, count 4, parent 2 pictures"
    assert folder == [f"{made}, index {i}, {photograph}" for i in range(4)]


def test_standard_output_is_signed(tiny, capfdbinary, monkeypatch):
    arguments = ["sample", "-n", "1", "-m", str(tiny), "--c2pa", "--out", "-"]
    monkeypatch.setattr(sys, "argv", ["fastigpt", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    Path("got.png").write_bytes(capfdbinary.readouterr().out)
    run("verify", "got.png")


@pytest.mark.parametrize("out", ["s.npz", "s.gif", "s.bmp", "s.tiff", "-.npz"])
def test_what_cannot_be_signed_is_refused_before_drawing(tiny, monkeypatch, capsys, out):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    error = fail(monkeypatch, capsys, "sample", "-n", 1, "-m", "nowhere", "--c2pa", "--out", out)
    assert f"--out {out}: --c2pa signs pictures (.png, .jpg, .webp)" in error
    assert sorted(os.listdir()) == ["tiny"]


def test_an_operators_certificate(tiny, monkeypatch, capsys):
    sample(tiny, "own.png", "--c2pa")
    leaf = tiny.parent / "data" / "fastigpt" / "c2pa" / "leaf.pem"
    assert stat.S_IMODE(leaf.stat().st_mode) == 0o600
    sample(tiny, "signed.png", "--c2pa-cert", leaf, "--c2pa-key", leaf)
    run("verify", "signed.png")
    error = fail(monkeypatch, capsys, "sample", "-n", 1, "-m", "nowhere", "--c2pa-cert", leaf, "--out", "x.png")
    assert "certificate was given without its key" in error
    error = fail(
        monkeypatch, capsys, "sample", "-m", "nowhere", "--c2pa-cert", "no.pem", "--c2pa-key", leaf, "--out", "x.png"
    )
    assert "no.pem cannot be read" in error
    assert not Path("x.png").exists()


def test_an_issuer_is_trusted_only_if_its_root_was_given(tiny):
    sample(tiny, "signed.png", "--c2pa")
    root = tiny.parent / "data" / "fastigpt" / "c2pa" / "root.pem"
    told = run("verify", "signed.png", "--trust", root).stdout
    assert f"valid, issuer 'fastigpt (self-made certificate)' trusted by {root}" in told
    root.parent.rename("elsewhere")
    sample(tiny, "other.png", "--c2pa")
    told = run("verify", "signed.png", "other.png", "--trust", root, status=1).stdout.splitlines()
    assert f"valid, {ISSUER}" in told[0] and "trusted by" in told[1] and "trusted" not in told[0]


def test_figures_as_json(tiny):
    sample(tiny, "signed.png", "--c2pa")
    sample(tiny, "plain.png")
    first, second = json.loads(run("verify", "signed.png", "plain.png", "--json", status=1).stdout)
    assert (first["file"], first["state"], first["seed"], first["model"]) == ("signed.png", "valid", "5", "tiny")
    assert (second["state"], second.get("seed")) == ("none", None)


def test_changed_damaged_and_foreign_files_are_one_line_each(tiny):
    sample(tiny, "signed.png", "--c2pa")
    good = Path("signed.png").read_bytes()
    files = {
        "changed.png": good[:-60] + bytes([good[-60] ^ 1]) + good[-59:],
        "truncated.png": good[:2000],
        "short.png": good[:10],
        "empty.png": b"",
        "text.png": b"hello\x1b[31m" * 100,
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    Path("folder.png").mkdir()
    os.mkfifo("pipe.png")
    names = [*files, "folder.png", "pipe.png", "missing.png", "signed.png"]
    lines = run("verify", *names, status=1).stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == names
    assert lines[0] == "changed.png: changed since it was signed"
    assert all(": cannot be read: " in line for line in lines[1:-1])
    assert "valid, issuer unknown" in lines[-1]


def test_what_strangers_write_does_nothing_to_a_terminal(tiny):
    from fastigpt.provenance.facts import Facts
    from fastigpt.provenance.signer import Signer

    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    name = "\x1b]0;evil\x07\n: trusted\u202e" + "x" * 5000
    Path("a\x1b[31m.png").write_bytes(Signer.own().sign(file.getvalue(), "png", Facts(name, 1, 2)))
    told = run("verify", "a\x1b[31m.png").stdout
    assert told.count("\n") == 1 and told.rstrip("\n").isprintable() and len(told) < 700


@pytest.mark.parametrize("content", [b"", b"nothing", None])
def test_roots_that_are_none_are_refused(tiny, monkeypatch, capsys, content):
    Path("picture.png").write_bytes(b"")
    if content is not None:
        Path("root.pem").write_bytes(content)
    assert "root.pem" in fail(monkeypatch, capsys, "verify", "picture.png", "--trust", "root.pem")


def test_without_c2pa_the_package_is_named(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert "--c2pa needs c2pa-python: pip install c2pa-python" in fail(
        monkeypatch, capsys, "sample", "-m", tiny, "--c2pa"
    )
    assert "verify needs c2pa-python" in fail(monkeypatch, capsys, "verify", "x.png")
