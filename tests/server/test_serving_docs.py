"""The client's programs in README.md and docs/ run against a server, as they stand but for its address."""

from __future__ import annotations

import pytest
from live import live
from PIL import Image
from test_docs import PAGES, SERVED, blocks

import fastigpt

ADDRESS = "http://127.0.0.1:8000"


def programs(page):
    return [(line, code) for line, info, code in blocks(page, "python") if info == SERVED]


@pytest.mark.parametrize("page", [page for page in PAGES if programs(page)], ids=lambda page: page.name)
def test_programs_of_clients_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").convert("RGB").save("photo.jpg")
    names: dict[str, object] = {"__name__": "__main__"}
    with live(fastigpt.load()) as server:
        assert sum(ADDRESS in code for _, code in programs(page)) == 1
        for line, code in programs(page):
            exec(compile("\n" * line + code.replace(ADDRESS, server.url), str(page), "exec"), names)
    houses = [Image.open(tmp_path / f"house-{index}.png") for index in (0, 1)]
    assert all(house.size == (1024, 1024) for house in houses)
    told = capsys.readouterr().out
    assert "drawn with seed 3" in told and told.count("partial_image") == 3 and told.count("completed") == 1


def test_every_metric_and_option_is_on_the_page():
    from typer.main import get_command

    from fastigpt.cli import app

    page = next(page for page in PAGES if page.name == "serving.md").read_text()
    shared = {"--device", "--backend", "--dtype", "--kv-dtype", "--port", "--help"}  # as other commands, or plain
    for parameter in get_command(app).commands["serve"].params:  # type: ignore[attr-defined]
        names = set(parameter.opts) | set(parameter.secondary_opts)
        assert names & shared or any(name in page for name in names), names
    with live() as server:
        told = server.get("/metrics").text
    for line in told.splitlines():
        if line.startswith("# TYPE fastigpt_") and not line.split()[2].endswith("_created"):
            name = line.split()[2]
            assert name in page or name.removeprefix("fastigpt") in page, name
