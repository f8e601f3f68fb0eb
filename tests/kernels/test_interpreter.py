"""Runs the kernel tests of this folder in Triton's interpreter, in two processes of their own at once."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent
# About equally long; every other file of this folder is in one of them.
GROUPS = (
    ("test_triton_engine.py", "test_kv_cache.py", "test_norm_linear.py", "test_causal_attention.py"),
    ("test_triton_sessions.py", "test_sample_head.py", "test_decode_attention.py", "test_gpu_ops.py"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    running = []
    for group in GROUPS:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *group]
        log = tmp_path_factory.mktemp("interpreter") / "log.txt"
        command.append(f"--junitxml={log.with_suffix('.xml')}")
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=FOLDER, env=environment, stdout=file, stderr=subprocess.STDOUT)
        running.append((process, log))
    yield running
    for process, _ in running:
        process.kill()


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_kernels_equal_their_twins_in_the_interpreter(runs, group, show):
    process, log = runs[group]
    returncode = process.wait()
    output = log.read_text()
    print(output[-6000:])
    assert returncode == 0
    assert " passed" in output and "skipped" not in output
    cases = ElementTree.parse(log.with_suffix(".xml")).findall(".//testcase")
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
    }
    assert files == {name for group in GROUPS for name in group}
