"""A model of classes behind a VQ is served as any other: its prompt is the number of a class."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from live import Live, live, pixels
from PIL import Image

from fastigpt.families.llamagen import read_file
from fastigpt.model import Model

FILE = Path(__file__).parents[1] / "families" / "llamagen_golden" / "c2i_tiny_64.pt"
HOW = {"seed": 3, "guidance_scale": 3.0, "top_k": 100}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(Model(read_file(FILE, n_head=4), device="cpu", backend="portable", dtype="float32")) as found:
        yield found


def test_the_pictures_are_those_of_sample(server):
    answer = server.client().images.generate(prompt="7", n=3, extra_body=HOW)
    expected = server.model.sample(3, label=7, output_type="np", **HOW)
    assert np.array_equal([pixels(image.b64_json) for image in answer.data], expected) and answer.size == "64x64"


def test_an_edit_keeps_what_its_mask_keeps(server):
    (image,) = server.model.sample(1, label=2, **HOW)
    anew = np.zeros((64, 64), bool)
    anew[:16] = True
    files = []
    for picture in (image, Image.fromarray(np.where(anew, 0, 255).astype(np.uint8))):
        rgba = image.convert("RGBA")
        if picture is not image:
            rgba.putalpha(picture)
        files.append(io.BytesIO())
        rgba.save(files[-1], "png")
        files[-1].seek(0)
    answer = server.client().images.edit(
        image=("a.png", files[0]), mask=("m.png", files[1]), prompt="7", extra_body={k: str(v) for k, v in HOW.items()}
    )
    expected = server.model.complete(image, mask=anew, label=7, output_type="np", **HOW)
    assert np.array_equal(pixels(answer.data[0].b64_json), expected[0])


def test_what_is_no_class_is_refused(server):
    with pytest.raises(openai.BadRequestError, match="prompt must be the number of a class, 0 to 9, not 'a cat'"):
        server.client().images.generate(prompt="a cat")
