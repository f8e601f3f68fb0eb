"""What keeps csrc/ simple, read from its sources: includes run one way, names are unique, files are short."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"

# What each folder may include: itself and these. include/ holds the interfaces, which stand on nothing.
ROOMS = {
    "include": set(),
    "simd": set(),
    "runtime": {"include"},
    "operators": {"include", "simd", "runtime"},
    "nearest": {"include", "runtime"},
    "codecs": {"include", "runtime", "operators"},
    "engine": {"include", "runtime", "operators"},
    "cuda": {"include"},
    "bindings": {"include", "operators"},
    "tests": {"include", "runtime", "operators", "codecs", "engine", "cuda"},
}
LONGEST_FILE = 400
TYPE = re.compile(r"^(?:template <[^;{]*>\s*)?(?:struct|class|enum class|enum) ([\w:]+)[^;()\n]*\{", re.MULTILINE)


@cache
def sources() -> dict[str, str]:
    """The text of every source by its path below csrc/."""
    paths = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    return {path.relative_to(CSRC).as_posix(): path.read_text() for path in paths}


@cache
def includes() -> dict[str, set[str]]:
    """The sources that every source includes."""
    return {name: {_find(name, found) for found in _quoted(text)} for name, text in sources().items()}


def _quoted(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE)


def _find(name: str, found: str) -> str:
    [path] = [path for path in (found, f"include/{found}") if path in sources()] or [None]
    assert path, f"csrc/{name} includes {found}, which is not a path below csrc/ or csrc/include/"
    return path


def room(name: str) -> str:
    return name.partition("/")[0]


def test_every_source_is_seen() -> None:
    """Else the tests below would pass on anything."""
    assert {room(name) for name in sources()} == ROOMS.keys()
    assert "operators/kernels.h" in includes()["engine/weights.h"]
    assert "include/fastigpt/dtype.h" in includes()["include/fastigpt/decode.h"]
    assert len(sources()) > 50 and sum(map(len, includes().values())) > 100


def test_includes_run_one_way() -> None:
    wrong = {
        f"{name} includes {found}"
        for name, others in includes().items()
        for found in others
        if room(found) not in {room(name), *ROOMS[room(name)]}
    }
    assert not wrong


def test_no_headers_include_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " includes ".join([*path, name])
        if name not in done:
            for other in sorted(includes()[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sources():
        visit(name, ())


def test_no_two_files_have_one_name() -> None:
    """But a header and the source that implements it."""
    files = defaultdict(list)
    for name in sources():
        files[Path(name).stem].append(name)
    twice = {stem: names for stem, names in files.items() if len(names) > 1}
    for names in twice.values():
        assert sorted(Path(name).suffix for name in names) == [".cpp", ".h"], names
        header, source = sorted(names, key=lambda name: Path(name).suffix == ".cpp")
        assert header in includes()[source], names


def test_no_two_types_have_one_name() -> None:
    places = defaultdict(set)
    for name, text in sources().items():
        for type_name in TYPE.findall(text):
            places[type_name].add(name)
    assert len(places) > 50
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


@pytest.mark.parametrize("other", ["Number", "Scalar", "ScalarType", "DataType"])
def test_one_enum_says_what_numbers_are_stored_as(other: str) -> None:
    pattern = re.compile(rf"\benum\b[^;{{]*\b{other}\b")
    assert not [name for name, text in sources().items() if pattern.search(text)]


def test_files_are_short() -> None:
    assert {name: lines for name, text in sources().items() if (lines := text.count("\n")) > LONGEST_FILE} == {}
