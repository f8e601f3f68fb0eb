"""Every option of every command with hostile values: it works, or it is one line on stderr and status 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from conftest import TINY, random_weights
from PIL import Image

from fastigpt import ImageGPT, Palette
from fastigpt.cli import app, main

VALUES = ["", " ", "abc", "-1", "0", "nan", "1e400", "3000000000", "9" * 30, "9" * 5000, "☃\n[red]%s", "../..", "a,b"]
COMMANDS = typer.main.get_command(app).commands
BASE = {
    "sample": ["sample", "-n", "1"],
    "complete": ["complete", "photo.png", "-n", "1", "--rows", "2"],
    "bench": ["bench", "--n", "1"],
    "convert": ["convert", "model.ckpt", "--palette", "p.npy", "--out", "converted"],
    "train": [
        "train",
        "photos",
        "--steps",
        "1",
        "--n-layer",
        "1",
        "--n-head",
        "1",
        "--n-embd",
        "8",
        "--batch-size",
        "1",
    ],
    "probe": ["probe", "photos", "-n", "9"],
    "info": ["info"],
    "verify": ["verify", "photo.png"],
    "serve": ["serve"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in model/, photographs in photos/, and photo.png."""
    folder = tmp_path_factory.mktemp("hostile")
    palette = Palette(np.random.default_rng(2).uniform(-1, 1, (9, 3)).astype(np.float32))
    ImageGPT(TINY, random_weights(TINY), palette=palette, backend="portable").save_pretrained(folder / "model")
    for kind in "ab":
        (folder / "photos" / kind).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / kind / f"{i}.png")
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


@pytest.fixture
def quick(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What comes after all checks and takes long is left out: training steps, measurements, probes,
    a server that listens."""

    def nothing(*args: object, **keywords: object) -> None:
        raise typer.Exit

    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data"))
    monkeypatch.setattr("fastigpt.training.run.Run.loop", nothing)
    monkeypatch.setattr("fastigpt.training.stages.Stage.loop", nothing)
    monkeypatch.setattr("fastigpt.bench.run.measure", nothing)
    monkeypatch.setattr("fastigpt.probe.probe", nothing)
    monkeypatch.setattr("fastigpt.server.run.serve", nothing)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def outcome(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """ "" if it works, else what is wrong with how it fails."""
    monkeypatch.setattr(sys, "argv", ["fastigpt", *arguments])
    try:
        main()
        status: object = 0
    except SystemExit as stop:
        status = stop.code
    except Exception as error:
        return f"raises {type(error).__name__}: {str(error)[:200]}"
    error_lines = capsys.readouterr().err.splitlines()
    if status == 0 or (arguments[0] == "verify" and status == 1 and not error_lines):  # photo.png has no record
        return ""
    if status != 2 or len(error_lines) != 1 or "incompatible function arguments" in error_lines[0]:
        return f"status {status}, {len(error_lines)} lines: {' | '.join(error_lines)[:300]}"
    return ""


def cases() -> list[tuple[str, str]]:
    shared = {name for p in COMMANDS["sample"].params for name in p.opts}
    return [
        (name, parameter.opts[-1])
        for name, command in COMMANDS.items()
        for parameter in command.params
        if parameter.opts[-1].startswith("-")
        and not (name == "complete" and parameter.opts[-1] in shared - {"-n", "--out"})
    ]


@pytest.mark.parametrize(("command", "option"), cases())
def test_every_option_takes_hostile_values(command, option, quick, monkeypatch, capsys):
    model = [] if command in ("info", "convert", "train", "verify") or option == "--model" else ["--model", "model"]
    wrong = {}
    for value in VALUES:
        if (command, option, value) == ("train", "--steps", "3000000000"):
            continue  # many steps are what was asked for
        found = outcome(monkeypatch, capsys, [*BASE[command], *model, f"{option}={value}"])
        if found:
            wrong[value[:40]] = found
    assert not wrong


@pytest.mark.parametrize("option", ["--stage", "--scenes", "--steps", "--batch-size", "--learning-rate", "--seed"])
def test_the_stages_take_hostile_values(option, quick, tmp_path, monkeypatch, capsys):
    base = ["train", "--stage", "tokenizer", "--out", str(tmp_path / "stages")]
    found = {value[:40]: outcome(monkeypatch, capsys, [*base, f"{option}={value}"]) for value in VALUES}
    assert not any(found.values())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["photos", "--stage", "tokenizer"], "images was given"),
        (["--stage", "tokenizer", "--n-layer", "2"], "n_layer was given"),
        (["--stage", "tokenizer", "--compile"], "compile was given"),
        (["--stage", "tokenizer", "--init", "my-model"], "init was given"),
        (["--stage", "tokenizer", "--device", "cuda"], "--device was given"),
        (["--stage", "tokenizer", "--scenes", "5"], "n_scenes was given"),
        (["--stage", "transformer"], "train the tokenizer first"),
        (["--scenes", "5"], "--scenes was given"),
    ],
)
def test_what_the_stages_do_not_take_is_said(arguments, word, quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastigpt", "train", "--out", str(tmp_path / "stages"), *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and word in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["sample", "--nonsense"],
        ["sample", "extra"],
        ["complete"],
        ["sample", "-n"],
        ["bench", "--rounds", "0"],
    ],
)
def test_calls_that_are_none_are_one_line(arguments, monkeypatch, capsys, quick):
    monkeypatch.setattr(sys, "argv", ["fastigpt", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
