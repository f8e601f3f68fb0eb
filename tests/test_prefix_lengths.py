"""Prompts of one call may be of different lengths for a model: each image is as if it had been asked for alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from llama_blocks import LLAMA, llama_weights

from fastigpt.codecs.preprocessing import Preprocessing
from fastigpt.model import Model
from fastigpt.overflow import OverflowWatch
from fastigpt.spec import ModelSpec

PROMPTS = ["", "ab", "a", "ba", "abc"]


class Letters:
    """A letter is an id; the prefix that guidance leads away from is as long as the prompt's."""

    def prefix(self, prompt: str, name: str = "prompt") -> tuple[int, ...]:
        return (*("abc".index(letter) for letter in prompt), *LLAMA.unconditional)

    def unconditional(self, prefix: tuple[int, ...]) -> tuple[int, ...]:
        return (*[4] * (len(prefix) - 1), prefix[-1])


@dataclass
class Lettered:
    config: dict
    codec, preprocessing, reader = None, Preprocessing(), Letters()
    spec: ModelSpec = LLAMA
    no_head, no_codec, defaults = None, "has none", {}

    def canonical(self):
        return llama_weights()

    def published(self):
        return {}


@pytest.fixture(params=["portable", "reference"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(Lettered({}), device="cpu", backend=request.param, dtype="float32")


def test_images_of_many_prompts_are_those_of_each_alone(model):
    canvases = torch.full((5, LLAMA.n_positions), -1)
    options = {"guidance_scale": 2.5, "seed": 2}
    found = model.fill(canvases, prompt=PROMPTS, **options)
    for i, prompt in enumerate(PROMPTS):
        assert torch.equal(found[i : i + 1], model.fill(canvases[:1], prompt=prompt, first_index=i, **options))


def test_guidance_leads_away_from_what_the_reader_says(model):
    (request,) = model.requests(torch.full((1, 16), -1), prompt="ab", guidance_scale=2.0)
    assert request.negative == (4, 4, 5)
    (request,) = model.requests(torch.full((1, 16), -1), prompt="ab", negative_prompt="c", guidance_scale=2.0)
    assert request.negative == (2, 5)


def test_scores_of_many_prompts_are_those_of_each_alone(model):
    tokens = model.fill(torch.full((5, LLAMA.n_positions), -1), seed=3)
    together = model.logits(tokens, prompt=PROMPTS), model.nll(tokens, prompt=PROMPTS)
    pooled = model.features(tokens, 1, prompt=PROMPTS)
    assert together[0].shape == (5, 16, 9)
    for i, prompt in enumerate(PROMPTS):
        alone = tokens[i : i + 1]
        assert torch.allclose(together[0][i], model.logits(alone, prompt=prompt)[0], atol=1e-5)
        assert torch.allclose(together[1][i], model.nll(alone, prompt=prompt)[0], atol=1e-5)
        assert torch.allclose(pooled[i], model.features(alone, 1, prompt=prompt)[0], atol=1e-5)


def test_sequences_of_all_lengths_are_watched_for_overflow(model, monkeypatch):
    seen = []
    model._watch = OverflowWatch(LLAMA, llama_weights())
    monkeypatch.setattr(model._watch, "check", lambda tokens, prefix: seen.append(tuple(prefix.shape)))
    model.fill(torch.full((5, LLAMA.n_positions), -1), prompt=PROMPTS, guidance_scale=2.5)
    assert seen == [(1, 1), (1, 2), (2, 3), (1, 4)] * 2
