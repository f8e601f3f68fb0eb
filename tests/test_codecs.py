"""What is above a codec knows neither that tokens are colours nor that one is a pixel."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from blocks import Blocks
from conftest import ODD, TINY, random_tokens, random_weights
from PIL import Image
from typer.testing import CliRunner

from fastigpt import ImageGPT, Palette
from fastigpt.cli import app
from fastigpt.codecs import band, patch, pixels_of, tokens_of
from fastigpt.codecs.palette import PaletteCodec

COLOURS = Palette(np.random.default_rng(3).uniform(-1, 1, (ODD.n_colors, 3)).astype(np.float32))


@pytest.fixture
def model() -> ImageGPT:
    """A model of 3 × 5 tokens that draws images of 12 × 15 pixels."""
    found = ImageGPT(ODD, random_weights(ODD), name="blocks", backend="portable")
    found.codec = Blocks(3, 5, ODD.n_colors)
    return found


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 30, 3), np.uint8))


def test_a_palette_is_a_codec_of_one_token_a_pixel():
    codec = PaletteCodec(COLOURS, 3, 5)
    tokens = random_tokens(ODD, 2)
    pixels = codec.decode(tokens)
    assert pixels.shape == (2, 3, 5, 3) and pixels.dtype == np.uint8 and codec.n_tokens == ODD.n_colors
    assert np.array_equal(pixels, COLOURS.colors[tokens.numpy()].reshape(2, 3, 5, 3))
    assert torch.equal(codec.encode(pixels), tokens) and codec.encode(pixels).dtype == torch.int64
    assert codec == PaletteCodec(COLOURS, 3, 5) != PaletteCodec(COLOURS, 5, 3)
    assert hash(codec) == hash(PaletteCodec(COLOURS, 3, 5))
    assert codec != PaletteCodec(Palette(-COLOURS.clusters), 3, 5)


def test_a_preview_shows_what_is_known_and_grey():
    codec = PaletteCodec(COLOURS, 3, 5)
    tokens = random_tokens(ODD, 2)
    hidden = torch.rand(2, 15, generator=torch.Generator().manual_seed(0)) < 0.5
    seen = codec.preview(tokens.masked_fill(hidden, -1)).reshape(2, 15, 3)
    assert np.array_equal(seen[~hidden], codec.decode(tokens).reshape(2, 15, 3)[~hidden])
    assert (seen[hidden] == 128).all()
    assert np.array_equal(codec.preview(tokens), codec.decode(tokens))


def test_tokens_and_the_pixels_they_stand_for():
    codec = Blocks(3, 5, 7)
    assert patch(codec) == (4, 3) and patch(PaletteCodec(COLOURS, 3, 5)) == (1, 1)
    assert band(codec, 2) == slice(8, 12)
    marked = np.zeros((2, 12, 15), bool)
    marked[0, 4, 3] = marked[1, 11, 14] = True  # a corner pixel is enough
    tokens = tokens_of(codec, marked)
    assert tokens.nonzero().tolist() == [[0, 6], [1, 14]]
    pixels = pixels_of(codec, tokens)
    assert pixels[0, 4:8, 3:6].all() and pixels[1, 8:, 12:].all() and pixels.sum() == 2 * 12
    assert np.array_equal(pixels_of(codec, torch.ones(1, 15, dtype=torch.bool)), np.ones((1, 12, 15), bool))


@pytest.mark.parametrize("kind, shape", [("np", (2, 12, 15, 3)), ("pt", (2, 3, 12, 15)), ("tokens", (2, 15))])
def test_images_have_the_codecs_size(model, kind, shape):
    tokens = model.sample(2, seed=5, output_type="tokens")
    found, stats = model.sample(2, seed=5, output_type=kind, return_stats=True)
    assert tuple(found.shape) == shape and stats.drawn.shape == stats.pass_starts.shape == (2, 3, 5)
    pictures = model.sample(2, seed=5)
    assert [picture.size for picture in pictures] == [(15, 12)] * 2
    assert np.array_equal(np.stack(pictures), model.codec.decode(tokens))
    assert model.image_size == (12, 15)


def test_a_photograph_is_resized_to_pixels_and_encoded(model, photo):
    small = np.asarray(photo.resize((15, 12), Image.Resampling.BILINEAR))
    tokens = model.encode(photo)
    assert torch.equal(tokens, model.codec.encode(small[None])) and tokens.shape == (1, 15)
    assert np.array_equal(model.decode(tokens), model.codec.decode(tokens))
    unfinished = tokens.clone()
    unfinished[0, 3] = -1
    assert (model.preview(unfinished)[0, :4, 9:12] == 128).all()


def test_rows_are_rows_of_tokens_and_masks_are_of_pixels(model, photo):
    tokens = model.encode(photo)
    assert torch.equal(model.known_cells(photo, rows=2), torch.arange(15)[None] < 10)
    mask = np.zeros((12, 15), bool)
    mask[3:5, 2] = True  # the last row of one patch and the first of the one below
    cells = ~model.known_cells(photo, mask=mask)
    assert cells.nonzero()[:, 1].tolist() == [0, 5]
    assert torch.equal(~model.known_cells(photo, mask=mask.repeat(2, 0).repeat(2, 1)), cells)  # of the photograph's
    done = model.complete(photo, 3, mask=mask, seed=0, output_type="tokens")
    assert torch.equal(done[:, ~cells[0]], tokens[:, ~cells[0]].expand(3, -1))
    with pytest.raises(ValueError, match="size of the canvas, 15 × 12, or of the image"):
        model.complete(photo, mask=np.zeros((3, 5), bool))
    with pytest.raises(ValueError, match="rows must be between 0 and 3"):
        model.complete(photo, rows=4)


def test_transparent_parts_are_drawn_anew(model, photo):
    alpha = np.full((24, 30), 255, np.uint8)
    alpha[:2, -2:] = 0  # one pixel of the canvas
    photo.putalpha(Image.fromarray(alpha))
    assert (~model.known_cells(photo)).nonzero().tolist() == [[0, 4]]


def test_a_stream_has_rows_of_tokens(model):
    whole = model.sample(2, seed=1, output_type="tokens")
    seen = torch.full((2, 15), -1)
    for images, row, tokens in model.stream(2, seed=1):
        assert tokens.shape == (len(images), 5)
        seen[images.start : images.stop, row * 5 : (row + 1) * 5] = tokens
        pixels = model.preview(seen)
        assert np.array_equal(pixels[:, band(model.codec, row)], model.decode(whole)[:, band(model.codec, row)])
    assert torch.equal(seen, whole)


def test_drafts_need_the_same_codec(model):
    other = ImageGPT(ODD, random_weights(ODD, 1), palette=COLOURS, backend="portable")
    with pytest.raises(ValueError, match="another palette or codebook"):
        model.sample(1, draft=other)


def test_the_command_line_writes_images_of_the_codecs_size(model, photo, tmp_path, monkeypatch):
    monkeypatch.setattr("fastigpt.api.load", lambda *args, **options: model)
    photo.save(tmp_path / "photo.png")

    def run(*arguments: object) -> dict:
        result = CliRunner().invoke(app, [*map(str, arguments), "--seed", "4", "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    run("sample", "-n", 3, "--out", tmp_path / "a.npz", "--heat-map", tmp_path / "map.png")
    with np.load(tmp_path / "a.npz") as archive:
        assert np.array_equal(archive["arr_0"], model.sample(3, seed=4, output_type="np"))
    assert (tmp_path / "map.png").exists()
    mask = np.zeros((12, 15), bool)
    mask[:4, :3] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    run("complete", tmp_path / "photo.png", "-n", 1, "--mask", tmp_path / "mask.png", "--scale", 1, "--out",
        tmp_path / "grid.png")  # fmt: skip
    with Image.open(tmp_path / "grid.png") as sheet:
        original, kept, result = (np.asarray(sheet)[2:14, 2 + 17 * i : 17 + 17 * i] for i in range(3))
    assert np.array_equal(original, model.decode(model.encode(photo))[0])
    assert (kept[mask] == 128).all() and np.array_equal(kept[~mask], original[~mask])
    assert np.array_equal(result[~mask], original[~mask])


def test_results_that_do_not_fit_are_refused_by_their_pixels(model, monkeypatch):
    monkeypatch.setattr("fastigpt.results.free_memory", lambda device: 4 * 12 * 15 * 3)
    assert model.sample(4, seed=0, output_type="np").shape == (4, 12, 15, 3)
    with pytest.raises(ValueError, match="5 images of 15 × 12 pixels"):
        model.sample(5, output_type="np")
    with pytest.raises(ValueError, match="images of 15 tokens"):
        model.sample(10**6, output_type="tokens")


def test_a_model_without_a_codec_draws_tokens_only():
    blind = ImageGPT(TINY, random_weights(TINY), backend="portable")
    assert blind.codec is None and blind.sample(1, output_type="tokens").shape == (1, 16)
    for call in (blind.sample, lambda: blind.image_size, lambda: blind.preview(random_tokens(TINY, 1))):
        with pytest.raises(ValueError, match="no palette"):
            call()
