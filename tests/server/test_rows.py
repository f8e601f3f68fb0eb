"""POST /rows: rows as they are drawn, of the pictures that the library draws. And the files of the page beside it."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from live import Live, live, pixels
from PIL import Image
from served_models import CONFIG, Gate, tiny_model

from fastigpt.engine import loop
from fastigpt.server.keys import Keys, make_key
from fastigpt.server.moderation import Moderation, Question
from fastigpt.server.service import Settings

H, W = CONFIG.height, CONFIG.width
PHOTO = np.random.default_rng(0).integers(0, 256, (12, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def server():
    with live() as found:
        yield found


def form(files: dict[str, bytes] | None = None, **fields: Any) -> dict[str, Any]:
    """As browsers send it."""
    parts: dict[str, Any] = {name: (None, str(value)) for name, value in {"prompt": "", **fields}.items()}
    return {"files": {**parts, **{name: (f"{name}.png", data, "image/png") for name, data in (files or {}).items()}}}


def events(answer: httpx2.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines() if line]


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def mask_png(mask: np.ndarray) -> bytes:
    """bool [H, W], True = draw anew."""
    return png(np.stack([np.zeros_like(mask, np.uint8)] * 3 + [np.where(mask, 0, 255).astype(np.uint8)], -1))


def rows_of(found: list[dict[str, Any]], image: int) -> np.ndarray:
    """uint8 [H, W, 3] put together from rows, which come in order and without gaps."""
    parts, next_row = [], 0
    for event in found:
        if event["type"] == "rows" and event["image"] == image:
            assert event["row"] == next_row and event["rows"] >= 1
            next_row += event["rows"]
            parts.append(np.frombuffer(base64.b64decode(event["pixels"]), np.uint8).reshape(event["rows"], W, 3))
    return np.concatenate(parts)


@pytest.mark.parametrize("body", ["form", "json"])
def test_rows_and_pictures_are_those_of_the_library(server: Live, body: str):
    given = {"prompt": "a red house", "n": 3, "seed": 2**64 - 1, "first_index": 5, "temperature": 0.5}
    given |= {"guidance_scale": 2.0, "negative_prompt": "blue"}
    found = events(server.post("/rows", **({"json": given} if body == "json" else form(**given))))
    assert found[0] == {
        "type": "start",
        "model": "tiny",
        "seed": str(2**64 - 1),
        "height": H,
        "width": W,
        "indices": ["5", "6", "7"],
        "signed": False,
    }
    assert found[-1] == {"type": "end"}
    pictures = {event["image"]: event for event in found if event["type"] == "image"}
    expected = _drawn(server, given)
    for image in range(3):
        assert np.array_equal(rows_of(found, image), expected[image])
        assert np.array_equal(pixels(pictures[image]["b64_json"]), expected[image])
        assert pictures[image]["index"] == str(5 + image)


def _drawn(server: Live, given: dict[str, Any]) -> np.ndarray:
    """uint8 [n, H, W, 3]: what the library draws."""
    options = {name: value for name, value in given.items() if name != "n"}
    requests = server.model.requests(torch.full((given["n"], H * W), -1), **options)
    return server.model.decode(loop.run(server.model.engine, requests)[0].tokens)


def test_an_upload_keeps_what_is_not_masked(server: Live):
    mask = np.zeros((H, W), bool)
    mask[2:4, 1:3] = True
    answer = server.post("/rows", **form({"image": png(PHOTO), "mask": mask_png(mask)}, n=2, seed=3))
    found = events(answer)
    expected = server.model.complete(Image.fromarray(PHOTO), 2, mask=mask, seed=3, output_type="np")
    for image in range(2):
        assert np.array_equal(rows_of(found, image), expected[image])
    kept = np.frombuffer(base64.b64decode(found[0]["kept"]), np.uint8).reshape(H, W, 4)
    assert np.array_equal(kept[..., 3] == 0, mask)
    assert np.array_equal(kept[~mask][:, :3], expected[0][~mask])


def test_rows_come_before_the_picture_is_finished():
    model = tiny_model()
    gate = Gate(model)
    with live(model) as server, gate.closed():
        gate.let(2 * W + 1)
        with httpx2.stream("POST", f"{server.url}/rows", timeout=60, **form(seed=1)) as answer:
            lines = (json.loads(line) for line in answer.iter_lines() if line)
            seen = [next(lines) for _ in range(3)]
            assert [event["type"] for event in seen] == ["start", "rows", "rows"]
            assert server.batch.running == 1
            gate.let_all()
            assert [event["type"] for event in lines] == ["rows"] * (H - 2) + ["image", "end"]


def test_a_client_who_leaves_frees_the_slots():
    model = tiny_model()
    gate = Gate(model)
    with live(model) as server, gate.closed():
        gate.let(W + 1)
        with httpx2.stream("POST", f"{server.url}/rows", timeout=60, **form(seed=1, n=2)) as answer:
            next(answer.iter_lines())
        while not (server.batch._given_up or server.batch.counts.cancelled):
            time.sleep(0.001)
        gate.let(1)
        while server.batch.running or server.batch.counts.cancelled < 2:  # the client may be gone before they run
            time.sleep(0.001)
        assert server.batch.counts.cancelled == 2


def test_what_fails_in_the_middle_is_an_event():
    model = tiny_model()
    gate = Gate(model)
    with live(model) as server, gate.closed():
        gate.error = RuntimeError("secret")
        gate.let_all()
        found = events(server.post("/rows", **form(seed=1)))
        assert found[-1]["type"] == "error" and found[-1]["error"]["code"] == "server_error"
        assert "secret" not in json.dumps(found)


@pytest.mark.parametrize(
    ("options", "status", "param"),
    [
        (form(prompt="a green house"), 400, "prompt"),
        (form(n="11"), 400, "n"),
        (form(stream="true"), 400, "stream"),
        (form(partial_images="2"), 400, "partial_images"),
        (form(rows="3"), 400, "rows"),
        (form({"mask": mask_png(np.ones((H, W), bool))}), 400, "mask"),
        (form({"image": png(PHOTO)}), 400, "mask"),
        (form({"image": b"nothing"}, rows="2"), 400, "image"),
        (form(model="other"), 404, "model"),
        (form(colour="red"), 400, "colour"),
        ({**form(), "headers": {"sec-fetch-site": "cross-site"}}, 403, None),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_drawn(server: Live, options, status, param):
    answer = server.post("/rows", **options)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_pictures_that_a_hook_judges_are_not_shown_before_it_did():
    seen: list[Question] = []
    moderation = Moderation(None, _judge(seen))
    with live(settings=Settings(moderation=moderation)) as server:
        found = events(server.post("/rows", **form(seed=1)))
    assert [event["type"] for event in found] == ["start", "image", "end"]
    assert [question.stage for question in seen][-1] == "output"


def _judge(seen: list[Question]) -> Any:
    def hook(question: Question) -> None:
        seen.append(question)

    return hook


def test_the_page_is_open_and_drawing_is_not(tmp_path):
    key, digest = make_key()
    (tmp_path / "keys").write_text(digest + "\n")
    with live(settings=Settings(keys=Keys.read(tmp_path / "keys"))) as server:
        for path in ("/", "/favicon.ico", "/page/page.js"):
            assert server.get(path).status_code == 200
        for path in ("/rows", "/page/../rows"):
            assert server.post(path, **form()).status_code == 401
        answer = server.post("/rows", **form(), headers={"authorization": f"Bearer {key}"})
        assert events(answer)[-1] == {"type": "end"}


def test_files_of_the_page_let_nothing_else_in(server: Live):
    for path in ("/", "/favicon.ico", "/page/page.css", "/page/page.js", "/page/mask.js", "/page/pictures.js"):
        answer = server.get(path)
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        again = server.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert again.status_code == 304 and not again.content
    for path in ("/page/nothing.js", "/page/../page.py", "/page/..%2fpage.py", "/page/__init__.py", "/page/"):
        assert server.get(path).status_code == 404


class _Attributes(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, name, value or "") for name, value in attributes]


def test_nothing_in_the_page_comes_from_elsewhere_or_stands_inline():
    static = files("fastigpt.server") / "static"
    page = _Attributes()
    page.feed((static / "page.html").read_text())
    assert not [found for found in page.found if found[1] == "style" or found[1].startswith("on")]
    links = [value for _, name, value in page.found if name in ("href", "src")]
    assert links and all(link.startswith(("/page/", "#")) for link in links)
    assert {link.removeprefix("/page/") for link in links if link.startswith("/page/")} <= {
        file.name for file in static.iterdir()
    }
    for file in static.iterdir():
        urls = re.findall(r"https?:[^\"')\s]*", file.read_text())
        assert set(urls) <= {"http://www.w3.org/2000/svg"}, file.name
