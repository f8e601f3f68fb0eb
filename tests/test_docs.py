"""Every Python block of README.md and docs/ runs, page by page, in a folder with a photo and a small model in it.

A page is one program: its blocks share their names. Blocks with the title "needs the network" are skipped, those with
"needs a GPU" and "needs jax" where there is none, in tests of their own. Commands of bash blocks are held to the
command line: sample, complete, info and verify are run, the others must at least be calls that it takes.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import skimage.data
import torch
import typer
from conftest import random_weights
from PIL import Image

import fastigpt
from fastigpt import api, cli
from fastigpt.bundled import BUNDLED
from fastigpt.checkpoint import read
from fastigpt.scenes import scenes

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?P<language>python|bash)(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S)
QUICK = ("sample", "complete", "info", "verify")


def blocks(page: Path, language: str) -> list[tuple[int, str, str]]:
    """Line number, info string and code of the page's blocks."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start("code")), match["info"].strip(), match["code"])
        for match in BLOCK.finditer(text)
        if match["language"] == language
    ]


# What blocks may need, and whether it is there.
NEEDS = {
    'title="needs the network"': False,
    'title="needs a GPU"': torch.cuda.is_available(),
    'title="needs jax"': importlib.util.find_spec("jax") is not None,
}


# Run where there is a server to run them against: tests/server/test_serving_docs.py.
SERVED = 'title="needs fastigpt serve"'


def run_page(page: Path, also: str = "") -> None:
    """Runs the blocks that need nothing, and those with this info string."""
    names: dict[str, object] = {"__name__": "__main__"}
    for line, info_string, code in blocks(page, "python"):
        assert not info_string or info_string in NEEDS or info_string == SERVED
        if info_string in ("", also):
            # Empty lines in front make tracebacks name the line of the page.
            exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with photo.jpg, scene.png, photos/, my-model/, which stands in for the package's own too."""
    photo = Image.fromarray(skimage.data.astronaut()).resize((160, 120))
    photo.save(tmp_path / "photo.jpg")
    Image.fromarray(next(scenes(2026, 2))[0]).save(tmp_path / "scene.png")
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        photo.save(tmp_path / "photos" / f"{name}.jpg")
    bundled = read(BUNDLED)
    # Its canvas, depth, colours and words with next to no weights: pages show calls, not pictures.
    config = replace(bundled.config, n_head=2, n_embd=16, n_inner=64)
    model = fastigpt.ImageGPT(
        config, random_weights(config), palette=bundled.palette, vocabulary=bundled.vocabulary, name="my-model"
    )
    model.save_pretrained(tmp_path / "my-model")
    monkeypatch.setattr(api, "BUNDLED", tmp_path / "my-model")
    api._kept.cache_clear()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    api._kept.cache_clear()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, folder, capsys):
    run_page(page)


@pytest.mark.parametrize(
    "page, info_string",
    sorted({(page, info) for page in PAGES for _, info, _ in blocks(page, "python") if info in NEEDS}),
    ids=lambda value: str(value.relative_to(ROOT)) if isinstance(value, Path) else value[len('title="') : -1],
)
def test_python_blocks_with_needs_run(page, info_string, folder, capsys):
    if not NEEDS[info_string]:
        pytest.skip(info_string[len('title="') : -1])
    run_page(page, also=info_string)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_commands(page, folder, capsys):
    commands = typer.main.get_command(cli.app).commands
    for line, _, code in blocks(page, "bash"):
        for text in re.findall(r"fastigpt [^&\n]*", code):
            name, *arguments = shlex.split(text, comments=True)[1:]
            assert name in commands, f"{page}:{line}: no command {name}"
            command, quick = commands[name], name in QUICK
            while hasattr(command, "commands"):  # a group
                name, *arguments = arguments
                assert name in command.commands, f"{page}:{line}: no command {name}"
                command = command.commands[name]
            with command.make_context(name, list(arguments)) as context:
                if quick:
                    command.invoke(context)


def test_every_page_is_in_the_navigation_and_no_block_is_of_a_kind_that_is_not_checked():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        assert str(page.relative_to(ROOT / "docs")) in navigation
        fences = re.findall(r"^\s*```(\S*)", page.read_text(), re.M)
        assert set(fences) <= {"", "python", "bash", "text"} and len(fences) % 2 == 0
        assert sum(fence in ("python", "bash") for fence in fences) == sum(
            len(blocks(page, language)) for language in ("python", "bash")
        )


def test_the_philox_vectors_on_the_page_are_the_tested_ones():
    from test_sampling import VECTORS

    page = (ROOT / "docs" / "sampling.md").read_text()
    for (seed, index, position), bits in VECTORS.items():
        assert f"{seed:#018x}" in page and f"{index:#018x}" in page and str(position) in page
        assert all(f"{word:08X}" in page for word in bits)
