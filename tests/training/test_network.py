"""The trainable network is the model: the names, shapes and logits of a checkpoint."""

import pytest
import torch
from conftest import engine, prefixes

from fastigpt.families.image_gpt import network as network_module
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.families.image_gpt.network import Network

CONFIG = ImageGPTConfig(3, 2, 24, height=3, width=5, n_colors=11, n_words=7, prompt_length=4)


def fresh(config=CONFIG, seed=0):
    network = Network(config, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():  # larger than at the start, so that mistakes show
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.3, generator=generator))
    return network


@pytest.mark.parametrize("config", [CONFIG, ImageGPTConfig(1, 1, 8, 12, height=2, width=2, n_colors=3)])
def test_state_dict_is_the_checkpoint(config):
    shapes = {name: tuple(tensor.shape) for name, tensor in Network(config).state_dict().items()}
    assert shapes == config.tensor_shapes()


@pytest.mark.parametrize("length", [1, 7, 15])
@pytest.mark.parametrize("with_prompt", [False, True])
@pytest.mark.parametrize("block", [4, 272])
def test_logits_are_those_of_the_reference(length, with_prompt, block, monkeypatch):
    monkeypatch.setattr(network_module, "_BLOCK", block)
    network = fresh()
    tokens = torch.randint(0, CONFIG.n_colors, (3, length))
    prompt = torch.randint(0, CONFIG.n_words, (3, CONFIG.prompt_length)) if with_prompt else None
    reference = engine("reference", CONFIG, dict(network.state_dict()), dtype="float64")
    expected = reference.logits(tokens, None if prompt is None else prefixes(reference, prompt)).double()
    torch.testing.assert_close(network(tokens, prompt).detach(), expected, atol=1e-6, rtol=1e-6)


def test_the_same_seed_gives_the_same_start():
    a, b, c = Network(CONFIG, seed=1), Network(CONFIG, seed=1), Network(CONFIG, seed=2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


@pytest.mark.parametrize("length", [1, 5, 8, 13])
def test_attention_in_blocks_has_the_values_and_gradients_of_the_other(length, monkeypatch):
    monkeypatch.setattr(network_module, "_BLOCK", 5)
    inputs = [torch.randn(2, 3, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.randn(2, 3, length, 8, dtype=torch.float64)
    outputs = [attend(*inputs) for attend in (network_module._attend_in_blocks, network_module._attend)]
    gradients = [torch.autograd.grad((y * weights).sum(), inputs) for y in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    for mine, theirs in zip(*gradients):
        torch.testing.assert_close(mine, theirs)
