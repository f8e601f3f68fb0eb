"""What users hand over where images and tokens go: files, arrays and tensors mean the same, or are refused by name."""

from __future__ import annotations

import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, random_tokens, random_weights
from PIL import Image

from fastigpt import ImageGPT, Palette
from fastigpt.cli import main

PALETTE = Palette(np.random.default_rng(2).uniform(-1, 1, (TINY.n_colors, 3)))
TOKENS = random_tokens(TINY, 2)
START = torch.cat([torch.full((2, 1), TINY.start_token), TOKENS[:, :5]], 1)


@pytest.fixture(scope="module")
def model() -> ImageGPT:
    return ImageGPT(TINY, random_weights(TINY), palette=PALETTE, backend="portable")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A phone's: white on top as a person sees it, stored on its side."""
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", exif=exif, quality=100)
    return tmp_path / "photo.jpg"


def read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


TAKERS: dict[str, Callable[[ImageGPT, Any], torch.Tensor]] = {
    "fill": lambda m, tokens: m.fill(tokens, seed=0),
    "nll": lambda m, tokens: m.nll(tokens),
    "logits": lambda m, tokens: m.logits(tokens),
    "features": lambda m, tokens: m.features(tokens),
    "decode": lambda m, tokens: torch.from_numpy(m.decode(tokens)),
    "stream": lambda m, tokens: torch.stack([t for _, _, t in m.stream(tokens, seed=0)]),
}


@pytest.mark.parametrize("name", TAKERS)
def test_int64_arrays_go_wherever_int64_tensors_go(model, name):
    take = TAKERS[name]
    expected = take(model, TOKENS)
    array = TOKENS.numpy()
    forms = [array, array.astype(">i8"), np.asfortranarray(array), array[::-1][::-1], read_only(array.copy())]
    forms += [torch._neg_view(-TOKENS), TOKENS.t().contiguous().t()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in forms:
            assert torch.equal(take(model, form), expected)
    for wrong, error in (
        (TOKENS.to("meta"), ValueError),
        (TOKENS.to_sparse(), TypeError),
        (TOKENS.int(), (TypeError, ValueError)),
        (array.astype(np.uint64), (TypeError, ValueError)),
        (array.astype(object), (TypeError, ValueError)),
        (array[0], ValueError),
    ):
        with pytest.raises(error, match=r"tokens|images"):
            take(model, wrong)


def test_generate_takes_int64_arrays(model):
    expected = model.generate(START, max_length=17)
    assert torch.equal(model.generate(START.numpy(), max_length=17), expected)
    assert torch.equal(model.generate(read_only(START.numpy().astype(">i8")), max_length=17), expected)
    for wrong, error in (
        (START.to("meta"), ValueError),
        (START.numpy().astype(np.int32), TypeError),
        ([[9]], TypeError),
    ):
        with pytest.raises(error, match="input_ids"):
            model.generate(wrong)


def test_files_go_wherever_images_go(model, photo, tmp_path):
    expected = model.encode(Image.open(photo))
    assert torch.equal(model.encode(photo), expected) and torch.equal(model.encode([str(photo)]), expected)
    white = int(PALETTE.encode(np.full((1, 3), 255, np.uint8))[0])
    assert (expected[0, :4] == white).all() and (expected[0, 12:] != white).all()
    assert torch.equal(model.features(photo), model.features(expected))
    assert torch.equal(model.known_cells(photo, rows=2), model.known_cells(Image.open(photo), rows=2))
    Image.fromarray(np.eye(4, dtype=bool)).save(tmp_path / "mask.png")
    with_files = model.complete([photo, str(photo)], 2, mask=tmp_path / "mask.png", seed=0, output_type="tokens")
    opened = [Image.open(photo)] * 2
    assert torch.equal(with_files, model.complete(opened, 2, mask=np.eye(4, dtype=bool), seed=0, output_type="tokens"))
    with pytest.raises(ValueError, match=r"cannot read the image .*no\.jpg"):
        model.complete([photo, tmp_path / "no.jpg"], rows=1)


def test_grey_and_float_images_are_the_colours_they_show(model):
    grey = np.random.default_rng(0).integers(0, 256, (2, 9, 7), dtype=np.uint8)
    expected = model.encode(grey[..., None].repeat(3, -1))
    tensor = torch.from_numpy(grey.copy())
    for form in (grey, grey / 255, tensor, tensor[:, None], tensor[:, None] / 255, list(grey), [grey[0], tensor[1]]):
        assert torch.equal(model.encode(form), expected)
        assert torch.equal(model.complete(form, rows=4, output_type="tokens"), expected)


# --- the command line ------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["fastigpt", *map(str, arguments)])
    main()


@pytest.fixture
def tiny(model: ImageGPT, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_complete_keeps_the_top_that_a_viewer_shows(tiny, photo, tmp_path, monkeypatch):
    common = ["complete", photo, "-n", 1, "--seed", 0, "--model", tiny, "--out", tmp_path / "o.npz"]
    Image.fromarray(np.eye(4, dtype=np.uint16) * 65535).save(tmp_path / "mask.png")
    for choice in (["--rows", 2], ["--mask", tmp_path / "mask.png"]):
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, *common, *choice)
        assert not stop.value.code
        white = PALETTE.decode(PALETTE.encode(np.full((1, 3), 255, np.uint8)))[0]
        assert (np.load(tmp_path / "o.npz")["arr_0"][0, 0, 1:] == white).all()


def test_a_bomb_is_one_line_on_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    Image.new("1", (8, 8)).save(tmp_path / "big.png")
    small = (tmp_path / "big.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 20000, 20000) + small[24:29]
    (tmp_path / "big.png").write_bytes(small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:])
    for options in ([tmp_path / "big.png", "--rows", 1], [tiny.parent / "a.png", "--mask", tmp_path / "big.png"]):
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, "complete", *options, "--model", tiny, "--out", tmp_path / "o.png")
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "big.png" in error and "400000000 pixels" in error
    assert not (tmp_path / "o.png").exists()


def test_train_takes_a_number_of_colours(tmp_path, monkeypatch, capsys):
    (tmp_path / "grey").mkdir()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "grey" / "a.png")
    sizes = ["--resolution", 4, "--n-layer", 1, "--n-head", 1, "--n-embd", 8, "--steps", 1, "--batch-size", 1]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "train", tmp_path / "grey", "--out", tmp_path / "run", "--colors", 8, *sizes)
    assert not stop.value.code, capsys.readouterr().err
    assert ImageGPT.from_pretrained(tmp_path / "run").config.n_colors == 8
