"""The acceptance run: what cannot run is said at once, a part that fails hides no other, one table at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.acceptance import __main__ as acceptance
from benchmarks.acceptance import parity
from benchmarks.acceptance.building import ROOT
from benchmarks.acceptance.results import Results, Rows


def accept(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.acceptance", "--out", str(out), *arguments],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_without_a_gpu_it_says_so_before_anything_is_built(tmp_path):
    run = accept(tmp_path / "out", TRITON_INTERPRET="0")
    assert run.returncode == 2 and "sees no GPU" in run.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_in_the_interpreter_it_compares_kernels_with_their_twins(tmp_path):
    pytest.importorskip("triton")
    run = accept(tmp_path, "--only", "machine", "tests", "engine", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stdout + run.stderr
    rows = Results(tmp_path).of("tests")
    files = {Path(row["work"]).name for row in rows if row.get("passed")}
    assert {"test_gpu_ops.py", "test_causal_attention.py", "test_decode_attention.py", "test_norm_linear.py",
            "test_sample_head.py"} <= files  # fmt: skip
    assert not any(row.get("failed") for row in rows) and "| machine | ok |" in run.stdout
    assert "engine" not in run.stdout.split("| stage |")[1]  # needs a GPU


def stage_results(**outcomes):
    """In place of run_stage: what it returns, by the stage's name."""
    return lambda name, out, site, seconds: {"stage": name, "seconds": 1.0, **outcomes[name]}


def test_a_stage_that_fails_or_hangs_hides_no_other(tmp_path, monkeypatch, capsys):
    outcomes = {
        "machine": {"ok": True},
        "tests": {"ok": False, "result": "stopped after 120 s", "log": "long"},
        "kernels": {"ok": False, "result": 1},
        "peers": {"ok": True},
    }
    monkeypatch.setattr(acceptance, "run_stage", stage_results(**outcomes))
    monkeypatch.setattr(acceptance, "why_no_extension", lambda site: None)
    rows = Rows(tmp_path, "kernels")
    rows.add(work="decode_attention", microseconds=3.0)
    rows.attempt("sample_head", lambda: 1 / 0)
    assert acceptance.run(tmp_path, list(outcomes)) == 1
    table = capsys.readouterr().out.split("| stage |")[1].splitlines()
    assert [line.split(" | ")[1] for line in table[2:]] == ["ok", "FAILED", "FAILED", "ok"]
    assert "stopped after 120 s" in table[3] and "sample_head" in table[4] and "decode_attention" not in table[4]
    assert "ZeroDivisionError" in (tmp_path / "README.md").read_text()
    assert [row["stage"] for row in json.loads((tmp_path / "results.json").read_text())["stages"]] == list(outcomes)


def test_without_the_extension_nothing_waits_for_it(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(acceptance, "run_stage", lambda name, *_: ran.append(name) or {"stage": name, "ok": False})
    monkeypatch.setattr(acceptance, "why_no_extension", lambda site: "No module named 'fastigpt._C'")
    monkeypatch.setattr(acceptance, "not_run", lambda stage, reason: {"stage": stage, "ok": False, "result": reason})
    monkeypatch.setattr(acceptance, "summary", lambda out, rows: str(rows))
    assert acceptance.run(tmp_path, ["build", "machine", "tests"]) == 1
    assert ran == ["build"] and "No module named 'fastigpt._C'" in capsys.readouterr().out


def test_rows_are_on_disk_before_the_stage_is_over(tmp_path):
    rows = Rows(tmp_path, "engine")
    rows.add(work="small n=1", seconds=0.3)
    assert Results(tmp_path).of("engine") == [{"work": "small n=1", "seconds": 0.3}]


@pytest.mark.parametrize("line", ["{test} {outcome} [ 5%]", "[gw3] [  5%] {outcome} {test} "])
def test_tests_are_counted_as_they_end(line):
    """With and without pytest-xdist; a run that is killed has said what it knows."""
    ends = [("tests/test_a.py::test_x[1 b]", "PASSED"), ("tests/test_a.py::test_y", "FAILED"),
            ("tests/kernels/test_b.py::test_z", "SKIPPED")]  # fmt: skip
    lines = [line.format(test=test, outcome=outcome) for test, outcome in ends]
    first, *others = parity.tally(["=== test session starts ===", *lines])
    assert first == [{"work": "tests/test_a.py", "passed": 1, "failed": 0, "error": 0, "skipped": 0}]
    assert len(others) == 2
    summary = ["=== FAILURES ===", "assert 'test_q.py::test PASSED'", "=== short test summary info ===",
               "FAILED tests/test_a.py::test_y - no", "ERROR tests/test_c.py - ImportError: no"]  # fmt: skip
    *_, last = parity.tally([*lines, *summary])
    assert [row["work"] for row in last] == [
        "tests/test_a.py", "tests/kernels/test_b.py", "tests/test_c.py", "tests/test_a.py::test_y", "tests/test_c.py",
    ]  # fmt: skip
    assert last[0]["failed"] == 1 and last[2]["error"] == 1
