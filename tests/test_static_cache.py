"""The baseline that the GPU engine is compared with draws what the reference draws: a wrong peer would flatter us."""

import sys
from pathlib import Path

import torch
from conftest import TINY, engine, random_weights

from fastigpt.engine import Drawing, Job

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "baselines"))

from static_cache import StaticCacheModel


def test_greedy_tokens_equal_the_reference():
    weights = random_weights(TINY, seed=3, biases=True)
    tokens = torch.full((2, TINY.n_pixels), -1)
    job = Job(tokens, torch.arange(2), torch.arange(2), None, Drawing(temperature=0.0))
    model = StaticCacheModel(TINY, weights, 2, device="cpu", dtype=torch.float32, compiled=False)
    assert torch.equal(model.sample(greedy=True), engine("reference", TINY, weights).fill(job).tokens)
    drawn = model.sample()
    assert drawn.shape == tokens.shape and ((drawn >= 0) & (drawn < TINY.n_colors)).all()
