"""The examples for other stacks do what they say, on models of few layers."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("accelerate_imagegpt.py", ["--layers", "2", "--tokens", "24", "--rounds", "2"], "100.0% of the greedy tokens"),
        ("gpt2_attention.py", ["--layers", "2", "--tokens", "12", "--device", "cpu"], "all the same as with sdpa"),
    ],
)
def test_examples_run(name, arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert said in capsys.readouterr().out
