"""What may not be imported, and when: help and completion wait for nothing heavy, `import fastigpt` for nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import fastigpt


def modules_after(code: str, **environment: str) -> set[str]:
    """Names of the top-level modules that a fresh interpreter holds after running this code."""
    ending = "import sys\nsys.stderr.write('\\n' + ' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    result = subprocess.run(
        [sys.executable, "-P", "-c", f"{code}\n{ending}"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return set(result.stderr.splitlines()[-1].split())


HEAVY = {"torch", "numpy", "PIL", "transformers", "huggingface_hub", "safetensors", "tqdm", "matplotlib", "triton"} | {
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "c2pa",
    "cryptography",
}
CALL = """
import sys
from fastigpt.cli import main
for arguments in {calls}:
    sys.argv = ["fastigpt", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (arguments, stop.code)
"""


def test_help_of_every_command_and_the_version_come_without_torch():
    names = ["sample", "complete", "info", "convert", "bench", "train", "probe", "serve", "verify", "job"]
    calls = [[], ["--help"], ["-h"], ["--version"], *([name, "--help"] for name in names)]
    calls += [["job", name, "--help"] for name in ("run", "status", "verify", "export")]
    assert not modules_after(CALL.format(calls=calls)) & HEAVY


def test_wrong_options_are_told_without_torch():
    code = CALL.format(calls=[["sample", "--scale", "0"], ["nonsense"]]).replace("not stop.code", "stop.code == 2")
    assert not modules_after(code) & HEAVY


@pytest.mark.parametrize("line", ["fastigpt ", "fastigpt sam", "fastigpt sample --te"])
def test_completion_comes_without_torch(line):
    asked = {"_FASTIGPT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    code = CALL.format(calls=[[]])
    assert not modules_after(code, **asked) & HEAVY


def test_importing_the_package_imports_none_of_its_modules():
    found = modules_after("import fastigpt\nassert 'sample' in dir(fastigpt)")
    assert not found & HEAVY


def test_what_the_library_needs_is_torch_numpy_pillow_and_no_more():
    code = "import fastigpt\nfor name in fastigpt.__all__: getattr(fastigpt, name)"
    unneeded = {"transformers", "huggingface_hub", "tqdm", "matplotlib", "sklearn", "triton", "typer", "rich", "scipy"}
    assert not (modules_after(code) - modules_after("import torch")) & unneeded


def test_every_public_name_is_there_to_import_and_to_complete():
    names: dict[str, object] = {}
    exec("from fastigpt import *", names)
    assert set(fastigpt.__all__) <= names.keys() and set(fastigpt.__all__) <= set(dir(fastigpt))
    assert "__version__" in dir(fastigpt) and fastigpt.__version__[0].isdigit()
    assert fastigpt.sampling.noise_bits and fastigpt.engine.choose
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fastigpt.nonsense


def test_python_minus_m_is_the_command():
    for module in ("fastigpt", "fastigpt.cli"):
        result = subprocess.run(
            [sys.executable, "-P", "-m", module, "--version"], capture_output=True, text=True, check=True
        )
        assert result.stdout == f"fastigpt {fastigpt.__version__}\n"


def test_operators_and_the_plain_twins_of_all_kernels_need_no_triton():
    modules_after("import sys; sys.modules['triton'] = None; import fastigpt.ops.norm_linear, fastigpt.ops.pass_end")
