"""No number that is not finite gets past an engine: weights that its dtype cannot hold, and logits that overflow, are
CheckpointErrors that name the model, whatever it was asked."""

from __future__ import annotations

import pytest
import torch
from conftest import CACHED, PROMPTED, TINY, random_tokens, random_weights

from fastigpt import CheckpointError, ImageGPT
from fastigpt.families import image_gpt
from fastigpt.overflow import OverflowWatch, cannot_overflow
from fastigpt.prompts import Vocabulary

BACKENDS = [*CACHED, "reference"]
# What overflows in float32 although every number is finite: gains of norms, biases, embeddings, the head, a lone row.
OVERFLOWING = {
    "gain": ("transformer.h.0.ln_1.weight", slice(None), 1e30),
    "last gain": ("transformer.ln_f.weight", slice(None), 3e38),
    "bias": ("transformer.h.1.mlp.c_proj.bias", slice(None), 3e38),
    "embeddings": ("transformer.wte.weight", slice(None), 3e38),
    "positions": ("transformer.wpe.weight", slice(None), 2e38),
    "queries": ("transformer.h.0.attn.c_attn.weight", slice(None), 1e25),
    "one colour of the head": ("lm_head.weight", 3, 3e38),
}


def model(backend: str, changes: dict[str, torch.Tensor], config=TINY, **kwargs) -> ImageGPT:
    weights = random_weights(config, biases=True) | changes
    vocabulary = Vocabulary(("<pad>", "a", "red", "house", "tree"), 3) if config.n_words else None
    return ImageGPT(config, weights, vocabulary=vocabulary, name="broken", backend=backend, device="cpu", **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", OVERFLOWING)
def test_logits_that_overflow_are_never_handed_out(backend, which):
    name, rows, value = OVERFLOWING[which]
    tensor = random_weights(TINY, biases=True)[name].clone()
    tensor[rows] = value
    tokens = random_tokens(TINY, 2)
    broken = model(backend, {name: tensor}, dtype="float32")
    calls = {
        "logits": lambda: broken.logits(tokens),
        "nll": lambda: broken.nll(tokens),
        "sample": lambda: broken.sample(2, seed=0, output_type="tokens"),
        "greedy": lambda: broken.sample(1, temperature=0, output_type="tokens"),
        "stream": lambda: list(broken.stream(1, seed=0)),
        "features": lambda: broken.features(tokens, layer=2),
        "fill": lambda: broken.fill(tokens.masked_fill(torch.arange(16) > 7, -1), seed=0),
    }
    for call in calls.values():
        with pytest.raises(CheckpointError, match=r"broken: .*not finite"):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompts_that_overflow(backend):
    changes = {"prompt.wte.weight": torch.full((5, 16), 3e38)}
    broken = model(backend, changes, PROMPTED, dtype="float32")
    broken.sample(1, seed=0, output_type="tokens")  # nothing wrong without a prompt
    with pytest.raises(CheckpointError, match=r"broken: .*not finite"):
        broken.sample(1, seed=0, prompt="a red", output_type="tokens")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["lm_head.weight", "transformer.wpe.weight", "transformer.h.0.ln_2.weight", "transformer.h.1.mlp.c_fc.bias"]
)
def test_weights_beyond_float32(backend, name):
    wide = random_weights(TINY, biases=True)[name].double()
    wide.view(-1)[3] = -1e39
    with pytest.raises(CheckpointError, match=f"broken: {name} holds 1e\\+39, which float32 cannot hold"):
        model(backend, {name: wide}, dtype="float32")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(backend, value):
    with pytest.raises(CheckpointError, match=r"broken: lm_head\.weight holds (nan|inf), which is not finite"):
        model(backend, {"lm_head.weight": torch.full((9, 16), value)})


def test_weights_beyond_a_smaller_dtype():
    head = {"lm_head.weight": torch.full((9, 16), 70000.0)}
    with pytest.raises(CheckpointError, match="float16 cannot hold"):
        model("portable", head, dtype="float16")
    model("portable", head, dtype="bfloat16").logits(random_tokens(TINY, 1))
    beyond = {"lm_head.weight": torch.full((9, 16), torch.finfo(torch.float32).max)}
    for backend in ("cpu", "portable"):
        with pytest.raises(CheckpointError, match="bfloat16 cannot hold"):
            model(backend, beyond, dtype="bfloat16")


def test_a_logit_beyond_float32_of_a_float64_model_is_not_handed_out():
    big = model("reference", {"lm_head.weight": torch.full((9, 16), 1e39, dtype=torch.float64)}, dtype="float64")
    with pytest.raises(CheckpointError, match="not finite"):
        big.logits(random_tokens(TINY, 1))


@pytest.mark.parametrize("config", [TINY, PROMPTED], ids=["tiny", "prompted"])
def test_what_is_proved_cannot_overflow_does_not(config):
    """Weights of any sizes: where the bound says yes, following a sequence in float64 finds nothing."""
    spec = image_gpt.spec(config)

    def weights_of(**options):
        return image_gpt.canonical(config, random_weights(config, biases=True, **options))

    assert cannot_overflow(spec, weights_of())
    assert cannot_overflow(spec, weights_of(scale=30))
    generator = torch.Generator().manual_seed(0)
    tokens = random_tokens(config, 2)
    proved = overflowing = 0
    for _ in range(80):
        weights = {
            name: tensor * 10.0 ** float(torch.empty(()).uniform_(-4, 10, generator=generator))
            for name, tensor in weights_of().items()
        }
        watch = OverflowWatch(spec, weights)
        if cannot_overflow(spec, weights):
            proved += 1
            watch.check(tokens)
        else:
            try:
                watch.check(tokens)
            except CheckpointError:
                overflowing += 1
    assert (proved > 5, overflowing > 5) == (True, True), (proved, overflowing)


def test_weights_next_to_nothing_in_int8():
    """Rows so small that the inverse of their scale is no float32 are zero."""
    tiny = {"transformer.h.0.mlp.c_fc.weight": torch.full((16, 64), 1e-40)}
    nothing = {"transformer.h.0.mlp.c_fc.weight": torch.zeros(16, 64)}
    tokens = random_tokens(TINY, 2)
    logits = [model("cpu", changes, dtype="int8").logits(tokens) for changes in (tiny, nothing)]
    assert torch.equal(*logits)


def test_weights_in_float64_that_are_beyond_all_measure_prove_nothing():
    spec, weights = image_gpt.spec(TINY), image_gpt.canonical(TINY, random_weights(TINY))
    for name in weights:
        assert not cannot_overflow(spec, {**weights, name: weights[name].double() * 1e300}), name
