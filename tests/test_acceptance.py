"""The acceptance run: what cannot run is said at once, a part that fails hides no other, one table at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.acceptance import __main__ as acceptance
from benchmarks.acceptance import parity, report, stages, tables
from benchmarks.acceptance.building import ROOT
from benchmarks.acceptance.engines import floor_seconds
from benchmarks.acceptance.results import Results, Rows
from fastigpt import ImageGPTConfig
from fastigpt.bench.floor import kv_bytes_per_token
from fastigpt.families import image_gpt


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


def test_the_time_limits_of_a_run_add_up_to_less_than_ten_minutes():
    assert stages.LIMIT < 600 - 20  # starting, and writing the report
    for name, run in stages.RUNS.items():
        assert sum(stages.STAGES[stage].seconds for stage in run) <= stages.LIMIT, name
    assert sum(parity.CHECKING for _ in parity.CHECKED) < stages.STAGES["memcheck"].seconds
    assert {stage for run in stages.RUNS.values() for stage in run} == stages.STAGES.keys()


def test_each_run_builds_what_it_needs_on_a_bare_machine():
    assert all(run[:2] == ("build", "machine") for run in stages.RUNS.values())
    assert stages.RUNS["first"] == ("build", "machine", "tests", "tune")
    assert stages.RUNS["second"] == ("build", "machine", "engine", "kernels", "quantise", "memcheck")


def test_the_second_run_is_refused_without_the_table_that_the_first_chose(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(acceptance, "why_not", lambda: None)
    monkeypatch.setattr(acceptance, "family", lambda: "sm90")
    monkeypatch.setattr(sys, "argv", ["acceptance", "second", "--out", str(tmp_path / "b"), "--chosen", str(tmp_path)])
    assert acceptance.main() == 2
    error = capsys.readouterr().err
    assert "sm90.json is missing" in error and "--chosen" in error and not (tmp_path / "b").exists()


def test_the_second_run_measures_with_the_table_that_the_first_chose(tmp_path, monkeypatch):
    first, out, shipped = tmp_path / "first", tmp_path / "second", tmp_path / "configs"
    shipped.mkdir(), first.mkdir()
    (first / "sm90.json").write_text('{"chosen": []}')
    (shipped / "sm90.json").write_text('{"shipped": []}')
    Rows(first, "tune").add(family="sm90")
    ran = []

    def run_stage(name, out, site, seconds):
        ran.append((name, (shipped / "sm90.json").read_text()))
        return {"stage": name, "ok": True, "seconds": 1.0}

    monkeypatch.setattr(acceptance, "why_not", lambda: None)
    monkeypatch.setattr(acceptance, "family", lambda: "sm90")
    monkeypatch.setattr(acceptance.dry, "prepared_folder", lambda site: shipped)
    monkeypatch.setattr(acceptance, "run_stage", run_stage)
    monkeypatch.setattr(acceptance, "why_no_extension", lambda site: None)
    monkeypatch.setattr(sys, "argv", ["acceptance", "second", "--out", str(out), "--chosen", str(first)])
    assert acceptance.main() == 0
    assert ran == [(name, '{"chosen": []}') for name in stages.RUNS["second"]]
    assert (out / "sm90.json").exists() and Results(out).of("tune") == [{"family": "sm90"}]


@pytest.mark.parametrize("bandwidth", [2.4e12, 4.3e12])  # of an H100 and an H200, about
def test_targets_mean_the_same_at_any_bandwidth(tmp_path, bandwidth):
    """A machine that copies at H200's rate meets a target in the seconds asked for; a slower one in as many more."""
    config = ImageGPTConfig.preset("small")
    rows = Rows(tmp_path, "engine")
    for n, asked in ((1, 0.35), (64, 0.65), (512, 512 / 130)):
        floor = floor_seconds(config, n, kv_bytes_per_token(image_gpt.spec(config), torch.bfloat16), bandwidth)
        seconds = asked * report.H200 / bandwidth * (0.99 if n == 1 else 1.01)
        rows.add(work=f"small n={n} bfloat16 cache", seconds=seconds, share_of_floor=floor / seconds)
    met = {line["work"]: line["met"] for line in report.measured(tmp_path)}
    assert [met[f"small n={n} bfloat16 cache"] for n in (1, 64, 512)] == ["yes", "no", "no"]
    assert met["large n=64 bfloat16 cache"] == ""  # not measured


def test_the_sanitizer_sees_every_allocation(tmp_path, monkeypatch):
    """torch's allocator would hide what is out of bounds inside its blocks; one test that hangs hides no other."""
    ran = []

    def run(command, *, env, timeout, **options):
        ran.append(command)
        assert command[0] == "compute-sanitizer" and env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        if len(ran) == 1:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(parity.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="1 parts of memcheck failed"):
        parity.memcheck(tmp_path, Rows(tmp_path, "memcheck"))
    assert len(ran) == len(parity.CHECKED)
    assert ["error" in row for row in Results(tmp_path).of("memcheck")] == [True, False, False]


def test_tables_have_short_names_for_what_they_say():
    assert tables.digest({"a": [{"b": 1, "c": 2}]}) == tables.digest({"a": [{"c": 2, "b": 1}]})
    assert tables.digest({"a": [{"b": 1}]}) != tables.digest({"a": [{"b": 2}]})


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_dry_run_walks_every_stage_and_file(tmp_path):
    """On a stand-in for a GPU: each stage of each run ends well, every target has a figure, and the second run uses
    what the first chose. Of speed and of what only hardware shows it shows nothing."""
    pytest.importorskip("triton")
    shipped = {path: path.read_bytes() for path in (ROOT / "fastigpt" / "kernels" / "configs").iterdir()}
    first, second = tmp_path / "first", tmp_path / "second"
    for name, arguments in (("first", (str(first),)), ("second", (str(second), "--chosen", str(first))), ("peers", (
        str(second),))):  # fmt: skip
        run = accept(Path(arguments[0]), name, *arguments[1:], "--dry-run")
        assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
        assert all(f"| {stage} | ok |" in run.stdout for stage in stages.RUNS[name]), run.stdout
    found = Results(second)
    assert found.of("tune")[0]["table"] == found.of("machine")[0]["table"] != Results(first).of("machine")[0]["table"]
    assert all(line["met"] for line in report.measured(second)), report.measured(second)
    assert {path.name for path in second.iterdir()} >= {"README.md", "results.json", "log.txt", "sm90.json",
                                                       "engine.png", "kernels.png"}  # fmt: skip
    assert {row["stage"] for row in found.of("stages")} == stages.STAGES.keys()
    assert shipped == {path: path.read_bytes() for path in shipped}  # what ships is as it was
