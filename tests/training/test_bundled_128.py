"""The bundled model of captions and 128 × 128 scenes: small, found by its name, and it draws what it is asked for."""

import numpy as np
import pytest
import torch

import fastigpt
from fastigpt.bundled import NAMED
from fastigpt.checkpoint import locate
from fastigpt.scenes.captions import EXAMPLES, parse
from fastigpt.scenes.describe import confirmed, describe
from fastigpt.training.evaluate import held_out, nats, reconstruction, small

PROMPT = "a red house on snow at night"


@pytest.fixture(scope="module")
def model():
    return fastigpt.load("scenes-128", backend="portable", dtype="float32")


def test_it_is_small():
    assert sum(file.stat().st_size for file in NAMED["scenes-128"].iterdir() if file.suffix != ".png") <= 16e6


def test_a_directory_of_its_name_comes_first(tmp_path, monkeypatch):
    assert locate("scenes-128") == NAMED["scenes-128"]
    (tmp_path / "scenes-128").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fastigpt.CheckpointError, match=r"config\.json is missing"):
        fastigpt.load("scenes-128")


def test_it_draws_what_prompts_ask_for(model):
    images = model.sample(
        len(EXAMPLES), prompt=list(EXAMPLES), guidance_scale=3.0, temperature=0.6, seed=0, output_type="np"
    )
    assert images.shape == (len(EXAMPLES), 128, 128, 3) and images.dtype == np.uint8
    held = [confirmed(parse(text), found) for text, found in zip(EXAMPLES, describe(small(images)))]
    assert np.mean([value for facts in held for value in facts.values()]) >= 0.8


def test_it_predicts_held_out_scenes_and_captions_help(model):
    figures = nats(model, held_out(16, side=128))
    assert figures["with caption"] < figures["without caption"] - 0.05 < 1.84


def test_scenes_survive_its_tokens(model):
    assert reconstruction(model, 16)["dB"] >= 29


def test_an_image_depends_on_its_seed_and_number_alone(model):
    options = {"guidance_scale": 2.0, "seed": 4, "output_type": "tokens"}
    both = model.sample(2, prompt=PROMPT, **options)
    assert both.shape == (2, 256) and torch.equal(model.sample(1, prompt=PROMPT, first_index=1, **options), both[1:])


def test_pictures_are_completed_by_mask_and_prompt(model):
    picture = held_out(1, side=128).images
    mask = np.zeros((128, 128), bool)
    mask[:64, :64] = True
    known = model.known_cells(picture, mask=mask)
    assert int(known.sum()) == 192
    tokens = torch.where(known, model.encode(picture), -1)
    filled = model.fill(tokens, prompt=PROMPT, guidance_scale=2.0, seed=1)
    assert (filled[known] == tokens[known]).all() and (filled[~known] >= 0).all()
    image = model.complete(picture, mask=mask, prompt=PROMPT, guidance_scale=2.0, seed=1, output_type="np")
    np.testing.assert_array_equal(image, model.decode(filled))


def test_transformers_opens_it_whole():
    from transformers import JanusForConditionalGeneration

    _, told = JanusForConditionalGeneration.from_pretrained(NAMED["scenes-128"], output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
