"""What a newcomer does first: installs without a compiler, imports from the repository's root."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup(tmp_path, **environment):
    """The step of a build in which pip asks for the metadata; it ends before setuptools is imported."""
    command = [sys.executable, str(ROOT / "setup.py"), "dist_info", "--output-dir", str(tmp_path)]
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    return subprocess.run(command, cwd=tmp_path, env=kept | environment, capture_output=True, text=True, check=False)


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name == "nt", reason="of Visual C++ setuptools says itself when it is missing")
@pytest.mark.parametrize(
    "environment, found",
    [
        ({"CC": "/nowhere/cc", "CXX": "/nowhere/cxx"}, "'/nowhere/cxx' cannot be run"),
        ({"PATH": "/nowhere"}, "cannot be run"),
        ({"CXX": "broken"}, "cannot compile: install one .* It says: cc: error: cannot execute 'cc1plus'"),
        ({"CXX": "headless"}, r"needs the headers of Python 3\.\d+, but .* does not find Python.h: install them"),
    ],
    ids=["not there", "no PATH", "without C++", "without headers"],
)
def test_without_a_compiler_one_sentence_says_what_to_do(tmp_path, environment, found):
    broken = script(tmp_path / "broken", "echo \"cc: error: cannot execute 'cc1plus': execvp\" >&2\nexit 1\n")
    headless = script(tmp_path / "headless", "echo 'check.cpp:1:10: fatal error: Python.h: No such file' >&2\nexit 1\n")
    named = {"broken": broken, "headless": headless}
    run = setup(tmp_path, **{name: named.get(value, value) for name, value in environment.items()})
    assert run.returncode == 1 and not run.stdout
    lines = run.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastigpt is built from source and needs ")
    assert "docs/install.md" in lines[0] and (ROOT / "docs" / "install.md").exists()
    assert re.search(found, lines[0]), lines[0]


def test_packages_that_others_probe_for_import_from_the_root():
    """transformers looks for packages such as `kernels` by name, and from the root Python finds our folders first."""
    code = "from transformers import ImageGPTForCausalImageModeling\nimport fastigpt.kernels.launch\n"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {"fastigpt"}
