"""The baseline that the engines are compared with draws what the reference draws: a wrong peer would flatter us."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, engine, fill, random_weights

from fastigpt.families import image_gpt
from fastigpt.sampling import Drawing

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "baselines"))

from static_cache import StaticCacheModel, StaticCachePeer


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_greedy_tokens_equal_the_reference(compiled):
    weights = random_weights(TINY, seed=3, biases=True)
    tokens = torch.full((2, TINY.n_pixels), -1)
    spec, canonical = image_gpt.spec(TINY), image_gpt.canonical(TINY, weights)
    model = StaticCacheModel(spec, canonical, 2, device="cpu", dtype=torch.float32, compiled=compiled)
    truth = fill(engine("reference", TINY, weights), tokens, Drawing(temperature=0.0))
    assert torch.equal(model.sample(greedy=True), truth.tokens)
    drawn = model.sample()
    assert drawn.shape == tokens.shape and ((drawn >= 0) & (drawn < TINY.n_colors)).all()


def test_a_pass_can_be_repeated_and_windows_are_refused(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    spec, canonical = image_gpt.spec(TINY), image_gpt.canonical(TINY, random_weights(TINY))
    peer = StaticCachePeer(spec, canonical, torch.device("cpu"), torch.float32)
    for position in (0, 5, TINY.n_pixels - 1):
        work = peer.prepared_pass(n=2, position=position)
        work(), work()
    with pytest.raises(ValueError, match="windows of 4"):
        peer.prepared_pass(n=2, position=5, window=4)
