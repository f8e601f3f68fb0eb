"""`fastigpt job`: what a person sees of it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_jobs import checkpoint, files, local
from typer.testing import CliRunner

import fastigpt
from fastigpt import ImageGPT
from fastigpt.cli import app, main
from fastigpt.jobs.directory import JobDirectory


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return checkpoint(tmp_path / "tiny")


def run(*arguments: object, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["job", *(str(a) for a in arguments)], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["fastigpt", "job", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error:") and "Traceback" not in error
    return error


def test_a_job_from_its_first_command_to_its_export(tiny):
    told = run("run", "fid", "-n", 20, "-m", tiny, "--seed", 3, "--shard-size", 4, "--part", "2/2").stdout
    assert "8 of 20 images, seed 3" in told and "complete" not in told
    told = run("status", "fid").stdout
    assert "8 of 20" in told and "images/s" in told and "MiB at most" in told and "left" in told
    assert "3 shards are missing" in run("verify", "fid").stdout
    told = run("run", "fid").stdout
    assert "20 of 20" in told and "complete, sha256 of all tokens" in told
    told = run("verify", "fid", "--redraw", 4).stdout
    assert "4 of 4 images drawn again" in told and "complete" in told
    assert "wrote fid.npz" in run("export", "fid", "npz", "--out", "fid.npz").stdout
    images = fastigpt.load(tiny).sample(20, seed=3, output_type="np")
    assert np.array_equal(np.load("fid.npz")["arr_0"], images)


def test_figures_come_as_json(tiny):
    facts = json.loads(run("run", "fid", "-n", 4, "-m", tiny, "--seed", 3, "--json").stdout)
    assert facts["done"] == 4 and facts["complete"] and facts["took"][0] == 4 and facts["parameters"]["seed"] == 3
    assert json.loads(run("status", "fid", "--json").stdout)["devices"]
    facts = json.loads(run("verify", "fid", "--redraw", 1, "--json").stdout)
    assert facts["right"] and facts["redrawn"][0]["differs"] == 0


def test_verify_ends_with_status_1_where_something_is_wrong(tiny):
    run("run", "fid", "-n", 8, "-m", tiny, "--seed", 3, "--shard-size", 4)
    job = JobDirectory.open(local(Path("fid")))
    job.store.put(f"shards/{job.record(1).file}", b"damaged")
    assert "000001" in run("verify", "fid", status=1).stdout
    run("run", "fid")
    run("verify", "fid")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_says_how_to_go_on(tiny, monkeypatch, number):
    fill, drawn = ImageGPT.fill, []

    def stopped(model: ImageGPT, canvases: torch.Tensor, **options: Any) -> Any:
        if len(drawn) == 2:
            os.kill(os.getpid(), number)
        drawn.append(1)
        return fill(model, canvases, **options)

    monkeypatch.setattr(ImageGPT, "fill", stopped)
    told = run("run", "fid", "-n", 20, "-m", tiny, "--seed", 3, "--shard-size", 4, status=128 + number).stderr
    assert "interrupted: 8 of 20 are drawn; fastigpt job run fid goes on" in told
    monkeypatch.undo()
    os.chdir(tiny.parent)
    run("run", "fid")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("run", ""), "DIRECTORY"),
        (("run", "new"), "how many images"),
        (("run", "new", "-n", 0), "n must be"),
        (("run", "new", "-n", 8, "--part", "0/2"), "i/N"),
        (("run", "new", "-n", 8, "--part", "3/2"), "i/N"),
        (("run", "new", "-n", 8, "--part", "half"), "i/N"),
        (("run", "new", "-n", 8, "--temperature", "nan"), "temperature"),
        (("run", "new", "-n", 8, "--prompts", "/no/file"), "/no/file"),
        (("run", "new", "-n", 8, "--window", "wide"), "window"),
        (("run", "tiny", "-n", 8), "holds config.json and no job"),
        (("run", "fid", "-n", 9, "--seed", 4), "seed is 3 in the job, and 4"),
        (("status", "new"), "holds no job"),
        (("verify", "new"), "holds no job"),
        (("verify", "fid", "--redraw", "-1"), "redraw"),
        (("export", "fid", "npz", "--out", "a.npz"), "not complete"),
        (("export", "fid", "gif", "--out", "a"), "gif"),
        (("export", "fid", "npz", "--out", ""), "empty"),
        (("status", "nonsense://x"), "nonsense"),
    ],
)
def test_errors_are_one_line_and_nothing_is_left_behind(tiny, monkeypatch, capsys, arguments, word):
    run("run", "fid", "-n", 8, "-m", tiny, "--seed", 3, "--shard-size", 4, "--part", "1/2")
    before = files(Path())
    more = ("-m", tiny) if arguments[0] == "run" and arguments[1] != "fid" else ()
    assert word in fail(monkeypatch, capsys, *arguments, *more)
    assert files(Path()) == before
