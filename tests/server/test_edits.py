"""POST /v1/images/edits: the official client's forms and JSON, and what is said of bad pictures."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from live import Live, live, pixels, png
from PIL import Image
from served_models import tiny_model

from fastigpt.server.service import Settings

RNG = np.random.default_rng(3)
PHOTO = RNG.integers(0, 256, (30, 20, 3), np.uint8)
HOLE = np.zeros((30, 20), bool)
HOLE[10:22, 5:15] = True


def masked(hole: np.ndarray, photo: np.ndarray | None = None) -> bytes:
    """A PNG that is transparent in the hole."""
    rgb = np.zeros((*hole.shape, 3), np.uint8) if photo is None else photo
    return png(np.dstack([rgb, np.where(hole, 0, 255).astype(np.uint8)]))


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(tiny_model(), settings=Settings(max_pixels=100_000)) as found:
        yield found


def completed(server: Live, **how: Any) -> np.ndarray:
    return server.model.complete(PHOTO, output_type="np", **how)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_mask_is_completes_mask(server, format):
    upload = png(PHOTO, format)
    how = {"seed": 2**63, "temperature": 0.9, "guidance_scale": 1.5, "first_index": 3}
    answer = server.client().images.edit(
        image=upload, mask=masked(HOLE), prompt="a red house", n=3, extra_body=how, size="8x12"
    )
    expected = server.model.complete(
        Image.open(io.BytesIO(upload)), 3, mask=HOLE, prompt="a red house", output_type="np", **how
    )
    assert np.array_equal([pixels(i.b64_json) for i in answer.data], expected.repeat(2, 1).repeat(2, 2))
    drawn = int((~server.model.known_cells(PHOTO, mask=HOLE)).sum())
    assert 0 < drawn < 24 and answer.usage.output_tokens == 3 * drawn
    assert answer.usage.input_tokens_details.image_tokens == 24 - drawn
    assert answer.seed == 2**63 and [image.index for image in answer.data] == [3, 4, 5]


def test_transparent_parts_of_the_image_are_drawn_anew_without_a_mask(server):
    answer = server.client().images.edit(image=masked(HOLE, PHOTO), prompt="", extra_body={"seed": 1})
    assert np.array_equal(pixels(answer.data[0].b64_json), completed(server, mask=HOLE, seed=1)[0])


def test_a_mask_goes_before_the_images_own_alpha(server):
    other = ~HOLE
    answer = server.client().images.edit(
        image=masked(HOLE, PHOTO), mask=masked(other), prompt="", extra_body={"seed": 1}
    )
    expected = server.model.complete(Image.open(io.BytesIO(masked(HOLE, PHOTO))), mask=other, seed=1, output_type="np")
    assert np.array_equal(pixels(answer.data[0].b64_json), expected[0])


def test_rows_keep_the_top(server):
    answer = server.client().images.edit(image=png(PHOTO), prompt="", n=2, extra_body={"seed": 1, "rows": 2})
    assert np.array_equal([pixels(i.b64_json) for i in answer.data], completed(server, n=2, rows=2, seed=1))


def test_only_alpha_0_is_drawn_anew(server):
    alpha = np.where(HOLE, 1, 255).astype(np.uint8)
    alpha[:2] = 0
    mask = png(np.dstack([np.zeros((30, 20, 3), np.uint8), alpha]))
    answer = server.client().images.edit(image=png(PHOTO), mask=mask, prompt="", extra_body={"seed": 1})
    assert np.array_equal(pixels(answer.data[0].b64_json), completed(server, mask=alpha == 0, seed=1)[0])


def test_a_photograph_is_turned_upright_and_so_is_its_mask_meant(server):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(np.rot90(PHOTO)).save(file, "PNG", exif=exif)
    answer = server.client().images.edit(image=file.getvalue(), mask=masked(HOLE), prompt="", extra_body={"seed": 1})
    assert np.array_equal(pixels(answer.data[0].b64_json), completed(server, mask=HOLE, seed=1)[0])


def test_a_mask_with_nothing_to_draw_gives_the_photograph_as_the_model_sees_it(server):
    answer = server.client().images.edit(image=png(PHOTO), mask=masked(~HOLE & HOLE), prompt="")
    assert np.array_equal(pixels(answer.data[0].b64_json), server.model.decode(server.model.encode(PHOTO))[0])
    assert answer.usage.output_tokens == 0


def test_json_with_data_urls(server):
    def url(file: bytes) -> dict[str, str]:
        return {"image_url": "data:image/png;base64," + base64.b64encode(file).decode()}

    body = {"prompt": "", "images": [url(png(PHOTO))], "mask": url(masked(HOLE)), "seed": 1, "moderation": "low"}
    answer = server.post("/v1/images/edits", json=body)
    assert answer.status_code == 200
    assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), completed(server, mask=HOLE, seed=1)[0])


def test_a_stream_shows_known_rows_and_those_that_are_drawn(server):
    hole = np.zeros((30, 20), bool)
    hole[10:20] = True  # rows 2 and 3 of six
    first, last = server.client().images.edit(
        image=png(PHOTO), mask=masked(hole), prompt="", stream=True, partial_images=1, extra_body={"seed": 1}
    )
    assert (first.type, last.type) == ("image_edit.partial_image", "image_edit.completed")
    expected = completed(server, mask=hole, seed=1)[0]
    assert np.array_equal(pixels(last.b64_json), expected)
    shown = expected.copy()
    shown[3] = 128
    assert np.array_equal(pixels(first.b64_json), shown)


def test_what_forms_hold_is_text(server):
    form = {"prompt": "", "n": "2", "seed": "7", "stream": "false", "temperature": "0.5", "rows": "1", "top_k": "3"}
    answer = server.post("/v1/images/edits", data=form, files={"image[]": png(PHOTO)})
    assert answer.status_code == 200, answer.text
    found = [pixels(image["b64_json"]) for image in answer.json()["data"]]
    assert np.array_equal(found, completed(server, n=2, rows=1, seed=7, temperature=0.5, top_k=3))


@pytest.mark.parametrize(
    "form, param, code",
    [
        ({"n": "two"}, "n", "invalid_type"),
        ({"n": "0"}, "n", "invalid_value"),
        ({"stream": "perhaps"}, "stream", "invalid_type"),
        ({"temperature": "nan"}, "temperature", "invalid_value"),
        ({"temperature": "1e400"}, "temperature", "invalid_value"),
        ({"seed": "1.5"}, "seed", "invalid_type"),
        ({"seed": "9" * 5000}, "seed", "invalid_value"),
        ({"rows": "7"}, "rows", "invalid_value"),
        ({"size[]": "auto"}, "size[]", "unknown_parameter"),
        ({"input_fidelity": "medium"}, "input_fidelity", "invalid_value"),
        ({"markup": "x"}, "markup", "unsupported_parameter"),
        ({"n": ["1", "2"]}, "n", "invalid_value"),
        ({"mask": "text"}, "mask", "invalid_value"),
    ],
)
def test_bad_values_in_forms_are_named(server, form, param, code):
    form = {"prompt": "", **({} if "mask" in form else {"rows": "1"}), **form}
    answer = server.post("/v1/images/edits", data=form, files={"image": png(PHOTO)})
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code), answer.text


def bomb(side: int = 30_000) -> bytes:
    """A small PNG that declares side² pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "files, param, message",
    [
        ({}, "image", "Missing required parameter: 'image'"),
        ({"image": b""}, "image", "cannot be read as PNG or JPEG or WEBP"),
        ({"image": b"\x89PNG\r\n\x1a\n broken"}, "image", "cannot be read"),
        ({"image": png(PHOTO)[:200]}, "image", "cannot be read"),
        ({"image": png(PHOTO, "GIF")}, "image", "it is in another format"),
        ({"image": png(PHOTO, "TIFF")}, "image", "it is in another format"),
        ({"image": bomb()}, "image", "900000000 pixels, more than the limit of 100000"),
        ({"image": png(PHOTO)}, "mask", "nothing says what to draw anew"),
        ({"image": png(PHOTO), "mask": png(PHOTO)}, "mask", "has no alpha channel"),
        ({"image": png(PHOTO), "mask": bomb()}, "mask", "900000000 pixels"),
        ({"image": png(PHOTO), "mask": masked(HOLE[:7])}, "mask", "must have the size of the canvas, 4 × 6, or of"),
        ({"image": png(PHOTO), "mask": png(PHOTO, "JPEG")}, "mask", "cannot be read as PNG"),
        ([("image[]", png(PHOTO)), ("image[]", png(PHOTO))], "image", "one image at a time; there are 2"),
        ([("image", png(PHOTO)), ("mask", masked(HOLE)), ("mask", masked(HOLE))], "mask", "more than one mask"),
        ({"image": png(PHOTO), "extra": b"x"}, "extra", "'extra' is no file"),
    ],
)
def test_bad_uploads_are_named(server, files, param, message):
    listed = files if isinstance(files, list) else list(files.items())
    answer = server.post("/v1/images/edits", data={"prompt": ""}, files=listed or {"other": b""})
    if not listed:
        answer = server.post("/v1/images/edits", json={"prompt": ""})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and message in error["message"], answer.text


def test_a_mask_and_rows_are_not_both_taken(server):
    with pytest.raises(openai.BadRequestError, match="Send 'rows' or a mask, not both"):
        server.client().images.edit(image=png(PHOTO), mask=masked(HOLE), prompt="", extra_body={"rows": 1})


@pytest.mark.parametrize(
    "images",
    [
        [{"image_url": "http://127.0.0.1:1/secret.png"}],
        [{"image_url": "file:///etc/passwd"}],
        [{"image_url": "data:image/png,raw"}],
        [{"image_url": "data:image/png;base64,%%%"}],
        [{"image_url": "data:;base64,é"}],
        [{"image_url": 7}],
        [{"file_id": "file-1"}],
        [{}],
        ["data:image/png;base64,AAAA"],
        "data:image/png;base64,AAAA",
    ],
)
def test_nothing_but_data_urls_is_read(server, images):
    answer = server.post("/v1/images/edits", json={"prompt": "", "images": images})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("invalid_image_url", "invalid_value", "unsupported_parameter")
