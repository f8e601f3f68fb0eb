"""What keeps the house simple, read from its sources: imports run one way, and each thing is known in one room only."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up: a module imports from its own layer and those below it. A package stands for all of its modules.
LAYERS = (
    "errors files formulas locks owner signals operands scalars spec sampling job extras untrusted signatures tensors",
    "nearest kernels ops",
    "engine",
    "classes",
    "tensor_files lazy_tensors prompts arguments",
    "image_arrays image_files images progress chunks",
    "codecs",
    "overflow results save options scenes",
    "families particles streaming",
    "checkpoint bundled",
    "filling drawing generating scoring model",
    "api integrations fastigpt",
    "heat_map info probe probe_data provenance training bench data",
    "jobs",
    "server",
    "cli __main__",
)

# Circles that are left, each with what is to be done about it.
KNOWN_CIRCLES: dict[frozenset[str], str] = {}

# Imports upwards that are left.
KNOWN_UPWARDS: dict[str, str] = {}

# What published checkpoints call their tensors and sizes, and the rooms that may know.
TENSOR_NAMES = re.compile(
    r"transformer\.(wte|wpe|h\.|ln_f)|lm_head|\b(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\b|\bprompt\.w[tp]e|\bln_[12]\b"
)
FIELD_NAMES = re.compile(r"\b(n_embd|n_ctx|vocab_size|layer_norm_epsilon|activation_function|scale_attn\w*)\b")
ROOMS = ("fastigpt/families/", "fastigpt/integrations/")
KNOWN_NAMES: dict[str, str] = {}
KNOWN_FIELDS = {
    "fastigpt/training/train.py": "n_embd is an argument of a training, and of an Image GPT's configuration",
    "fastigpt/cli/make.py": "n_embd is an option of a training",
    "fastigpt/bench/peers.py": "makes transformers' model of an Image GPT's configuration",
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name below fastigpt, "fastigpt" for the package itself."""
    found = {}
    for folder, package in ((ROOT / "fastigpt", ""),):
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            name = ".".join(part for part in parts if part and part != "__init__")
            assert name not in found, f"{path} and {found[name]} have one name"
            found[name or "fastigpt"] = path
    return found


@cache
def imports() -> dict[str, frozenset[str]]:
    """What every module imports of the package: at its top, inside functions, and for type checkers only."""
    return {name: frozenset(_imports(path) & modules().keys() - {name}) for name, path in modules().items()}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found |= {_module(f"{node.module}.{alias.name}") for alias in node.names}
    return found


def _module(name: str) -> str:
    """The module that an imported name is or comes from; "" for other packages and the extension."""
    if name.partition(".")[0] != "fastigpt" or name == "fastigpt._C":
        return ""
    name = name.removeprefix("fastigpt").removeprefix(".")
    if name and name not in modules():
        name = name.rpartition(".")[0]
    return name or "fastigpt"


def layer(module: str) -> int:
    top = module.partition(".")[0]
    found = [i for i, names in enumerate(LAYERS) if top in names.split()]
    assert len(found) == 1, f"fastigpt.{module} stands in {len(found)} of the layers of {Path(__file__).name}"
    return found[0]


def circles() -> set[frozenset[str]]:
    """Sets of modules that reach each other."""
    reached = {name: _reachable(name) for name in modules()}
    return {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in modules()
        if name in reached[name]
    }


def _reachable(start: str) -> set[str]:
    found: set[str] = set()
    ahead = list(imports()[start])
    while ahead:
        if (name := ahead.pop()) not in found:
            found.add(name)
            ahead += imports()[name]
    return found


def test_every_import_is_seen():
    """Else the tests below would pass on anything."""
    assert {"engine.triton", "engine.cpu", "kernels.launch"} <= imports()["engine.choose"]  # inside functions
    assert "sampling" in imports()["ops.pass_end"] and "model" in imports()["api"]
    assert "engine" in imports()["engine.portable.session"] and "fastigpt" not in imports()["nearest"]
    assert len(modules()) > 60


def test_nothing_imports_upwards():
    upwards = {
        f"{name} imports {other}" for name, found in imports().items() for other in found if layer(other) > layer(name)
    }
    assert upwards == KNOWN_UPWARDS.keys(), "or a known one is gone and has to leave the list"


def test_no_modules_import_each_other_in_a_circle():
    assert circles() == KNOWN_CIRCLES.keys(), "or a known circle is gone and has to leave the list"


@pytest.mark.parametrize(
    "pattern, known", [(TENSOR_NAMES, KNOWN_NAMES), (FIELD_NAMES, KNOWN_FIELDS)], ids=["tensors", "fields"]
)
def test_published_names_are_known_to_families_only(pattern, known):
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("fastigpt", "kernels", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".cu") and pattern.search(path.read_text())
    }
    left = {name for name in found if not name.startswith(ROOMS)}
    assert left == known.keys(), "or a known file is clean and has to leave the list"
    assert found & {"fastigpt/families/image_gpt/__init__.py", "fastigpt/families/image_gpt/config.py"}


# The formula of a block, to be told by its activation: once in each engine and operator, where a reader looks for it.
ACTIVATION = re.compile(r"quick_gelu\(|1\.702")


@pytest.mark.parametrize("room", ["fastigpt/engine/portable", "fastigpt/engine/reference.py"])
def test_the_formula_of_a_block_stands_once_in_an_engine(room):
    path = ROOT / room
    texts = [file.read_text() for file in (path.rglob("*.py") if path.is_dir() else [path])]
    assert sum(len(ACTIVATION.findall(text)) for text in texts) == 1


FORMULAS = {  # what tells them: the one file that has it
    "torch.rsqrt(": "fastigpt/formulas.py",
    "torch.sigmoid(": "fastigpt/formulas.py",
    "softmax(-1) @": "fastigpt/formulas.py",
    ".amax(-1)": "fastigpt/ops/kv_cache.py",
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_plain_formula_stands_once(formula):
    """Norm, activation, attention and the scales of an 8-bit cache: reference engine, training and twins share them."""
    found = [str(path.relative_to(ROOT)) for path in (ROOT / "fastigpt").rglob("*.py") if formula in path.read_text()]
    assert found == [FORMULAS[formula]]


LONGEST = 400  # lines of a file that somebody wrote


def test_no_file_is_longer_than_a_reader_holds_in_mind():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in ("fastigpt", "benchmarks", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".cu") and (ROOT / "csrc" / "tests") not in path.parents
    }
    assert len(lengths) > 200
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST}


def test_every_benchmark_is_one_that_pytest_measures():
    """Under --benchmark-only what does not take the fixture is skipped, and nobody notices."""
    for path in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        benches = [function for function in functions if function.name.startswith(("bench_", "test_"))]
        assert benches and all("benchmark" in [a.arg for a in function.args.args] for function in benches), path.name
