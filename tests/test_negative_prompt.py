"""negative_prompt: what guidance leads away from, wherever a prompt is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import PROMPTED, TINY, random_weights
from PIL import Image
from typer.testing import CliRunner

from fastigpt import ImageGPT, Palette
from fastigpt.cli import app
from fastigpt.prompts import Vocabulary

WORDS = Vocabulary(("<pad>", "a", "red", "house", "tree"), 3)
PALETTE = Palette(np.random.default_rng(2).uniform(-1, 1, (9, 3)).astype(np.float32))
SCALE = 3.0


@pytest.fixture
def model(backend: str) -> ImageGPT:
    return ImageGPT(
        PROMPTED, random_weights(PROMPTED), palette=PALETTE, vocabulary=WORDS, backend=backend, dtype="float32",
        kv_dtype="float32",
    )  # fmt: skip


def greedy(canvases: torch.Tensor, prompt: str | None, negative: str | None) -> torch.Tensor:
    """The likeliest tokens under u + s·(c − u), one after another, with the reference's logits."""
    truth = ImageGPT(PROMPTED, random_weights(PROMPTED), vocabulary=WORDS, backend="reference", dtype="float32")
    tokens = canvases.clamp(min=0)
    for i in range(PROMPTED.n_pixels):
        c, u = (truth.logits(tokens, prompt=text)[:, i] for text in (prompt, negative))
        tokens[:, i] = torch.where(canvases[:, i] < 0, (u + SCALE * (c - u)).argmax(-1), canvases[:, i])
    return tokens


@pytest.mark.parametrize("prompt, negative", [("a red house", "tree"), ("tree", "red red"), (None, "tree")])
def test_guided_tokens_are_those_of_the_logits_by_hand(model, prompt, negative):
    canvases = torch.full((2, 16), -1)
    canvases[1, [0, 5, 6, 15]] = torch.tensor([3, 1, 8, 2])
    options = {"prompt": prompt, "negative_prompt": negative, "guidance_scale": SCALE, "temperature": 0.0}
    expected = greedy(canvases, prompt, negative)
    assert torch.equal(model.fill(canvases, **options), expected)
    assert torch.equal(model.sample(1, output_type="tokens", **options), expected[:1])
    for images, row, tokens in model.stream(canvases, **options):
        assert torch.equal(tokens, expected[images.start : images.stop, 4 * row : 4 * row + 4])
    assert not torch.equal(expected, greedy(canvases, prompt, None))


def test_one_for_all_or_one_for_each(model):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8))
    options = {"rows": 1, "guidance_scale": SCALE, "seed": 4, "output_type": "tokens"}
    each = model.complete([photo] * 2, 2, prompt="a", negative_prompt=["tree", "red"], **options)
    for k, negative in ((0, "tree"), (2, "red")):
        alone = model.complete(photo, 2, prompt="a", negative_prompt=negative, first_index=k, **options)
        assert torch.equal(each[k : k + 2], alone)


def test_without_one_guidance_leads_away_from_no_prompt(model):
    options = {"prompt": "red", "guidance_scale": SCALE, "seed": 1, "output_type": "tokens"}
    assert torch.equal(model.sample(3, **options), model.sample(3, negative_prompt=None, **options))
    led_to_itself = model.sample(3, prompt="red", negative_prompt="red", guidance_scale=0.0, seed=1,
                                 output_type="tokens")  # fmt: skip
    assert torch.equal(led_to_itself, model.sample(3, prompt="red", seed=1, output_type="tokens"))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"prompt": "red"}, ValueError, "negative_prompt was given without guidance_scale"),
        (
            {"guidance_scale": 2.0, "negative_prompt": "horse"},
            ValueError,
            "negative_prompt: unknown word 'horse'.*house",
        ),
        ({"guidance_scale": 2.0, "negative_prompt": ""}, ValueError, "negative_prompt '' has no words"),
        ({"guidance_scale": 2.0, "negative_prompt": ["red"]}, ValueError, "negative_prompt has 1 entries for 2"),
        ({"guidance_scale": 2.0, "negative_prompt": [1, 2]}, TypeError, "negative_prompt must be a string"),
    ],
)
def test_impossible_ones_are_refused_by_name(model, options, error, message):
    options = {"prompt": "a", "negative_prompt": "tree", **options}
    with pytest.raises(error, match=message):
        model.sample(2, **options)
    with pytest.raises(error, match=message):
        model.stream(2, **options)


def test_a_model_without_words_says_so():
    with pytest.raises(ValueError, match="negative_prompt was given, but this model reads no text"):
        ImageGPT(TINY, random_weights(TINY), backend="portable").sample(
            1, negative_prompt="tree", guidance_scale=2.0, output_type="tokens"
        )


def test_the_command_line_takes_one(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "drawn.npz"
    options = ["--seed", "3", "--backend", model.backend, "--dtype", "float32", "--kv-dtype", "float32"]
    guided = ["--prompt", "red", "--negative-prompt", "tree", "--guidance-scale", str(SCALE)]
    result = CliRunner().invoke(
        app, ["sample", "-n", "2", "--model", str(tmp_path / "model"), "--out", str(out), *options, *guided]
    )
    assert result.exit_code == 0, result.output
    expected = model.sample(2, seed=3, prompt="red", negative_prompt="tree", guidance_scale=SCALE, output_type="np")
    with np.load(out) as archive:
        assert np.array_equal(archive["arr_0"], expected)
