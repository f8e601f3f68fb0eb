"""Runs the kernel tests of this folder in Triton's interpreter, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
# Every other file of this folder is in one of them; the first is among the quick tests.
GROUPS = (
    ("test_kv_cache.py", "test_norm_linear.py"),
    ("test_triton_engine.py", "test_causal_attention.py"),
    ("test_triton_sessions.py", "test_sample_head.py", "test_decode_attention.py", "test_gpu_ops.py"),
    ("test_capture.py", "test_shipped_rows.py", "test_tuning.py"),
)


@pytest.mark.parametrize("group", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, len(GROUPS)))])
def test_kernels_equal_their_twins_in_the_interpreter(group, tmp_path, show):
    xml = tmp_path / "results.xml"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={xml}"]
    run = subprocess.run(
        [*command, *GROUPS[group]], cwd=FOLDER, env=environment, capture_output=True, text=True, check=False
    )
    print(run.stdout[-6000:], run.stderr[-2000:])
    assert run.returncode == 0
    assert " passed" in run.stdout and "skipped" not in run.stdout
    cases = ElementTree.parse(xml).findall(".//testcase")
    lines = [f"{'in the interpreter, beside its plain twin':46} cases  seconds"]
    for file in GROUPS[group]:
        own = [case for case in cases if Path(file).stem in case.attrib["classname"].split(".")]
        assert own, file
        seconds = sum(float(case.attrib["time"]) for case in own)
        lines.append(f"{file:46} {len(own):5} {seconds:8.1f}")
    show("\n".join(lines))


def test_every_file_is_in_a_group():
    files = {path.name for path in FOLDER.glob("test_*.py")} - {
        "test_interpreter.py",
        "test_compile.py",
        "test_launches.py",
        "test_one_arithmetic.py",
        "test_overlap.py",
    }
    assert files == {name for group in GROUPS for name in group}


@pytest.mark.slow
def test_every_shipped_row_equals_its_twin_in_the_interpreter():
    """Those of all tables, of which the quick tests run one GPU's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-m", "slow"]
    run = subprocess.run(
        [*command, "test_shipped_rows.py"], cwd=FOLDER, env=environment, capture_output=True, text=True, check=False
    )
    print(run.stdout[-6000:], run.stderr[-2000:])
    assert run.returncode == 0 and " passed" in run.stdout and "skipped" not in run.stdout
