"""The bundled model: small, good at scenes, helped by captions, and with a palette that photographs survive."""

import numpy as np
import pytest
from PIL import Image
from skimage import data

import fastigpt
from fastigpt.bundled import BUNDLED, bundled_palette
from fastigpt.scenes.captions import EXAMPLES, parse
from fastigpt.training.data import scene_vocabulary
from fastigpt.training.evaluate import held_out, nats


def signal_to_noise(pixels):
    palette = bundled_palette()
    error = palette.decode(palette.encode(pixels)).astype(float) - pixels
    return 10 * np.log10(255**2 / np.square(error).mean())


def test_it_is_small():
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) <= 6e6


def test_it_predicts_held_out_scenes_and_captions_help():
    figures = nats(fastigpt.load(backend="portable"), held_out(24))
    assert figures["with caption"] < figures["without caption"] - 0.01 < 0.33


def test_its_words_are_those_of_the_scenes():
    vocabulary = fastigpt.load(backend="portable").vocabulary
    assert vocabulary == scene_vocabulary()
    for text in EXAMPLES:
        assert parse(vocabulary.decode(vocabulary.encode(text))) == parse(text)


@pytest.mark.parametrize(("name", "least"), [("astronaut", 29), ("chelsea", 29), ("coffee", 27)])
def test_photographs_survive_its_palette(name, least):
    photo = Image.fromarray(getattr(data, name)()).resize((32, 32), Image.Resampling.BILINEAR)
    assert signal_to_noise(np.asarray(photo)) >= least


def test_scenes_survive_its_palette():
    assert signal_to_noise(held_out(64).images) >= 37
