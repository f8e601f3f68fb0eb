"""The reference engine is the truth for all others; here it is itself held to transformers' ImageGPT."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    HEAD_DIM_96,
    ODD,
    PROMPTED,
    TINY,
    engine,
    fill,
    huggingface_model,
    prefixes,
    random_tokens,
    random_weights,
)

from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.sampling import Drawing

SMALL = ImageGPTConfig.preset("small")
CONFIGS = {"tiny": TINY, "odd": ODD, "head_dim_96": HEAD_DIM_96, "small": SMALL}


def with_start(tokens: torch.Tensor, config: ImageGPTConfig) -> torch.Tensor:
    return torch.cat([torch.full_like(tokens[:, :1], config.start_token), tokens[:, :-1]], 1)


# One pass of the large shape is enough.
@pytest.mark.parametrize("shape, biases", [(s, b) for s in CONFIGS for b in (False, True) if (s, b) != ("small", True)])
def test_logits_and_loss_equal_transformers(shape, biases):
    config = CONFIGS[shape]
    weights = random_weights(config, seed=3, biases=biases)
    tokens = random_tokens(config, 1 if shape == "small" else 3)[:, : 96 if shape == "small" else None]
    with torch.inference_mode():
        theirs = huggingface_model(config, weights)(with_start(tokens, config)).logits
    ours = engine("reference", config, weights).logits(tokens)
    difference = float((ours - theirs).abs().max())
    print(f"{shape}: max |logit difference| {difference:.2e}, logits spread over {float(theirs.std()):.2f}")
    assert difference <= 1e-4
    assert theirs.std() > 0.3  # else the bound would say little
    loss = torch.nn.functional.cross_entropy
    assert loss(ours.mT, tokens) == pytest.approx(float(loss(theirs.mT, tokens)), abs=1e-5)


@pytest.mark.parametrize("shape", ["tiny", "odd", "head_dim_96"])
def test_hidden_states_equal_transformers_layer_by_layer(shape):
    config = CONFIGS[shape]
    weights = random_weights(config, seed=4, biases=True)
    tokens = random_tokens(config, 2)
    theirs = huggingface_model(config, weights).transformer
    with torch.inference_mode():
        states = theirs(with_start(tokens, config), output_hidden_states=True).hidden_states
        # the last one comes out normed by ln_f, the others raw
        normed = [theirs.h[i].ln_1(state) for i, state in enumerate(states[:-1])] + [states[-1]]
    reference = engine("reference", config, weights)
    assert len(normed) == config.n_layer + 1
    for layer, expected in enumerate(normed):
        assert (reference.hidden(tokens, layer) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("shape", ["tiny", "odd"])
def test_greedy_tokens_equal_transformers(shape):
    config = CONFIGS[shape]
    weights = random_weights(config, seed=5)
    model = huggingface_model(config, weights)
    # max_length counts the start token, and transformers can't embed position n_pixels: the last token takes one pass
    # more
    start = torch.full((2, 1), config.start_token)
    start = torch.cat([start, torch.tensor([[1], [2]])], 1)
    theirs = model.generate(start, max_length=config.n_pixels + 1, do_sample=False, pad_token_id=0, eos_token_id=None)
    tokens = torch.full((2, config.n_pixels), -1)
    tokens[:, 0] = start[:, 1]
    ours = fill(engine("reference", config, weights), tokens, Drawing(temperature=0.0))
    assert torch.equal(ours.tokens, theirs[:, 1:])


def test_float64_agrees_with_float32():
    weights = random_weights(TINY, seed=6)
    tokens = random_tokens(TINY, 2)
    single = engine("reference", TINY, weights).logits(tokens)
    double = engine("reference", TINY, weights, dtype=torch.float64).logits(tokens)
    assert double.dtype == torch.float64
    assert 0 < (single - double).abs().max() < 1e-5


def test_logits_look_only_at_earlier_tokens():
    weights = random_weights(TINY, seed=7)
    reference = engine("reference", TINY, weights)
    a, b = random_tokens(TINY, 1, seed=1), random_tokens(TINY, 1, seed=1)
    b[0, 9] = (b[0, 9] + 1) % TINY.n_colors
    difference = (reference.logits(a) - reference.logits(b)).abs().amax(-1)[0]
    assert (difference[:10] == 0).all()
    assert (difference[10:] > 0).all()


def test_a_prompt_changes_the_logits_and_its_absence_is_a_plain_model():
    weights = random_weights(PROMPTED, seed=8)
    tokens = random_tokens(PROMPTED, 2)
    reference = engine("reference", PROMPTED, weights)
    plain = {name: tensor for name, tensor in weights.items() if not name.startswith("prompt.")}
    without = engine("reference", TINY, plain).logits(tokens)
    assert torch.equal(reference.logits(tokens), without)
    one = reference.logits(tokens, prefixes(reference, torch.tensor([[1, 2, 0], [1, 2, 0]])))
    other = reference.logits(tokens, prefixes(reference, torch.tensor([[2, 1, 0], [2, 1, 0]])))
    assert (one - without).abs().max() > 1e-2 and (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_low_precision_is_refused(dtype):
    with pytest.raises(ValueError, match="float32 or float64"):
        engine("reference", TINY, random_weights(TINY), dtype=dtype)
