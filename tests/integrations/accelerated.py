"""Models of transformers beside accelerated ones, for the tests of accelerate."""

from __future__ import annotations

import warnings

import torch
from conftest import TINY, huggingface_model, random_weights
from transformers import ImageGPTForCausalImageModeling

import fastigpt
from fastigpt import ImageGPTConfig

START = TINY.start_token
IDS = torch.tensor([[START, 1, 2], [START, 4, 4]])


def twins(config: ImageGPTConfig = TINY, backend: str = "auto", *, seed: int = 0, biases: bool = True, **options):
    """The same model twice: transformers' own and an accelerated one."""
    weights = random_weights(config, seed, biases=biases)
    theirs, ours = (huggingface_model(config, weights) for _ in range(2))
    return theirs, fastigpt.accelerate(ours, backend=backend, **options)


def served(model: ImageGPTForCausalImageModeling, *args, **kwargs):
    """The result of generate, and a failure if it fell back."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this call of generate")
        return model.generate(*args, **kwargs)
