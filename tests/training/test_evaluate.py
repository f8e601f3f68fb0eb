"""The evaluation's figures: full marks for a painter that does what it is asked, and low ones for one that does not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastigpt.bundled import bundled_palette
from fastigpt.probe import Probe
from fastigpt.training import evaluate
from fastigpt.training.data import scene_vocabulary


class Painter:
    """Stands in for a model: its samples are the held-out scenes the captions were made from, `shift` places on."""

    name, vocabulary, reader, codec = "painter", scene_vocabulary(), object(), None
    config = SimpleNamespace(height=32, width=32)

    def __init__(self, shift=0):
        self.shift, self.palette = shift, bundled_palette()

    def encode(self, images):
        return torch.from_numpy(self.palette.encode(images)).flatten(1)

    def decode(self, tokens):
        return self.palette.decode(tokens.view(-1, 32, 32).numpy())

    def nll(self, tokens, prompt=None):
        return torch.full((len(tokens),), 2.0 if prompt is None else 1.0)

    def sample(self, n, *, prompt=None, guidance_scale=None, temperature=1.0, seed, output_type):
        drawn = evaluate.held_out(n)
        assert prompt is None or prompt == drawn.captions
        return np.roll(self.decode(self.encode(drawn.images)), self.shift, axis=0)

    def complete(self, images, *, rows, seed, output_type):
        return np.roll(self.decode(self.encode(images)), self.shift, axis=0)


@pytest.fixture(autouse=True)
def few_renderings(monkeypatch):
    monkeypatch.setattr(evaluate, "_RENDERINGS", 200)


@pytest.fixture(autouse=True)
def one_probe(monkeypatch):
    """The painter has no layers; probes have tests of their own (test_probe.py)."""

    def probe_of_the_sky(model, data, *, seed):
        return [Probe("sky", len(set(data.labels["sky"])), 60, 20, 0.25, 0.5, (0.6, 0.875), (0.3, 0.4))]

    monkeypatch.setattr(evaluate.probe, "probe", probe_of_the_sky)


def test_a_painter_that_follows_gets_full_marks():
    figures = evaluate.evaluate(Painter(), n=48, n_probe=300)
    assert figures["nats"] == {"without caption": 2.0, "with caption": 1.0}
    assert figures["reader"]["all"] >= 0.97
    assert all(shares["all"] >= 0.97 for shares in figures["prompts"].values())
    assert figures["completion"]["all"] >= 0.97 and set(figures["completion"]) == {
        "all",
        "sky",
        "kind",
        "color",
        "side",
    }
    diverse = figures["diversity"]
    assert diverse["samples to training"] == diverse["held-out to training"] > 10
    text = evaluate.table(figures)
    assert "2.0000 | 1.0000" in text and text.count("prompts, guidance") == 4
    assert "| layer 1 | 87.5 (40.0) |" in text and "| classes | 4 |" in text


def test_a_painter_that_does_not_listen_gets_low_marks():
    deaf = evaluate.prompt_following(Painter(shift=1), 48, 1.0, 0)
    assert deaf["all"] < 0.5 and deaf["color"] < 0.5
    assert evaluate.completion(Painter(shift=1), 32, 0)["color"] < 0.5


def test_collapse_and_memory_show_as_distances_of_zero():
    model = Painter()
    for seed in evaluate.TRAINING_SEEDS:
        trained = evaluate._draw(seed, 0, 3).images
        model.sample = lambda n, trained=trained, **_: model.decode(model.encode(np.repeat(trained[:1], n, axis=0)))
        figures = evaluate.diversity(model, 8, 0)
        distances = figures["samples to training"], figures["among samples"]
        assert distances == pytest.approx((0, 0), abs=0.1) and figures["among held-out"] > 10


def test_large_pictures_are_averaged_down():
    drawn = evaluate.held_out(40, side=128)
    means = evaluate.small(drawn.images)
    assert means.shape == (40, 32, 32, 3)
    assert (means[3, 5, 7] == drawn.images[3, 20:24, 28:32].mean((0, 1)).round()).all()
    assert np.abs(means.astype(int) - evaluate.held_out(40).images).mean() < 4


def test_what_tokens_keep_is_measured():
    kept = evaluate.reconstruction(Painter(), 16)
    assert kept["dB"] > 37 and 0 < kept["error"] < 4


def test_nearest_is_the_root_mean_square_difference():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 5, 2, 3, 3)).astype(np.uint8)
    every = np.sqrt(((a[:, None].astype(float) - b[None]) ** 2).mean((2, 3, 4)))
    assert evaluate._nearest(a, b) == pytest.approx(every.min(1).mean(), rel=1e-5)


def test_distances_near_zero_are_exact():
    """Whatever the processor's matrix product rounds to, equal pictures are 0 apart and one step in a channel shows."""
    picture = np.full((1, 32, 32, 3), 255, np.uint8)
    other = picture.copy()
    other[0, 31, 31, 2] -= 1
    assert evaluate._nearest(picture, np.concatenate([other, picture])) == 0
    assert evaluate._nearest(np.repeat(picture, 3, axis=0), None) == 0
    assert evaluate._nearest(picture, other) == pytest.approx((1 / 3072) ** 0.5, rel=1e-12)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="n must be at least 2"):
        evaluate.evaluate(Painter(), n=1)
    with pytest.raises(ValueError, match="reads no prompts"):
        evaluate.evaluate(SimpleNamespace(name="mute", reader=None, codec=None))
