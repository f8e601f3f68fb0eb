"""Bars count images, are seen where a person watches, and are lines in logs."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, random_weights

from fastigpt import ImageGPT
from fastigpt.progress import image_bar, watched


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_images_with_a_rate_and_the_row_they_are_at(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with image_bar(4, None, height=2) as bar:
        assert bar.shown
        bar.rows(4, 0)
        bar.rows(4, 1)
        bar._bar.refresh()
    shown = sys.stderr.getvalue()
    assert "4/4" in shown and "image/s" in shown and "row 2 of 2" in shown


def test_rows_count_as_their_share_of_an_image(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with image_bar(10, True, height=4) as bar:
        counts = []
        for row in range(4):
            bar.rows(3, row)
            counts.append(bar._bar.n)
        bar.images(5)
        assert counts == [0, 1, 2, 3] and bar._bar.n == 5


def test_images_of_particles_are_counted_as_they_are_finished(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr("fastigpt.progress.LOG_SECONDS", 0.0)
    model = ImageGPT(TINY, random_weights(TINY), backend="portable")
    canvases = torch.full((3, 16), -1)
    canvases[:, 12:] = 2
    model.fill(canvases, particles=2, batch_size=2, seed=0, progress=True)
    lines = sys.stderr.getvalue().splitlines()
    counts = [int(line.split(" of ")[0]) for line in lines]
    assert {1, 2, 3} <= set(counts) and counts == sorted(counts)


def test_a_log_gets_lines_and_no_carriage_returns(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with image_bar(500, True) as bar:
        for done in range(1, 501):
            bar.images(done)
    lines = sys.stderr.getvalue().splitlines()
    assert "\r" not in sys.stderr.getvalue() and len(lines) <= 3
    assert "500 of 500 images" in lines[-1] and "image/s" in lines[-1]


def test_nobody_is_told_of_a_short_job_in_a_log(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with image_bar(50, None) as bar:
        assert not bar.shown
    with image_bar(50, True, log_after=60.0) as bar:
        bar.images(50)
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize(("shell", "seen"), [("ZMQInteractiveShell", True), ("TerminalInteractiveShell", False)])
def test_a_notebook_is_watched_though_its_stderr_is_no_terminal(monkeypatch, shell, seen):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    found = type(shell, (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: found))
    assert watched() is seen


def test_stats_print_in_a_line(capsys):
    model = ImageGPT(TINY, random_weights(TINY), backend="portable")
    _, stats = model.sample(3, seed=5, output_type="tokens", window=1, return_stats=True)
    print(stats)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and len(line) < 160
    assert "seed 5" in line and "3 images" in line and "images/s" in line and "16 passes per image" in line
    assert "1 image " in repr(model.sample(1, output_type="tokens", return_stats=True)[1])
