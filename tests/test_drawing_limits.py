"""Extreme settings of a draw: the limit of the formula or one ValueError, the same in all engines and operators; and
the kinds of numbers that may be given."""

from __future__ import annotations

import math
import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CACHED, PROMPTED, TINY, random_weights

import fastigpt.ops as ops
from fastigpt import ImageGPT
from fastigpt.ops.sample_head import on_cpu, sample_head_reference
from fastigpt.prompts import Vocabulary
from fastigpt.sampling import MAX_GUIDANCE, Drawing, checked_drawing, filter_logits, guide

VOCABULARY = Vocabulary(("<pad>", "a", "red", "house", "tree"), 3)
ENGINES = [*CACHED, "reference"]
SMALL = [1e-30, 1e-31, 1e-37, 1e-38, 1e-39, 1e-42, 1e-45, 1e-60, 5e-324]


@pytest.fixture(scope="module")
def models() -> list[ImageGPT]:
    weights = random_weights(PROMPTED)
    return [ImageGPT(PROMPTED, weights, vocabulary=VOCABULARY, backend=b, dtype="float32") for b in ENGINES]


def outcome(model: ImageGPT, **options: Any) -> object:
    try:
        return model.sample(2, output_type="tokens", progress=False, **({"seed": 3} | options)).tolist()
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("temperature", SMALL)
def test_the_smallest_temperatures_are_greedy_in_every_engine(models, temperature):
    greedy = outcome(models[0], temperature=0)
    assert all(outcome(model, temperature=temperature) == greedy for model in models)
    guided = {"prompt": "a red house", "guidance_scale": 1.5}
    greedy = outcome(models[0], temperature=0, **guided)
    assert all(outcome(model, temperature=temperature, top_k=3, **guided) == greedy for model in models)


@pytest.mark.parametrize("options", [
    {"temperature": 1e30}, {"temperature": 3.4e38}, {"temperature": 3.4e38, "top_k": 3}, {"top_k": 2**31},
    {"window": 3_000_000_000}, {"window": 2**70},
    {"top_k": 2**70}, {"top_p": 5e-324}, {"top_p": 1 - 1e-16}, {"first_index": 2**63 - 2},
    {"prompt": "a tree", "guidance_scale": 1e30}, {"prompt": "a tree", "guidance_scale": 5e-324},
    {"prompt": "a tree", "guidance_scale": MAX_GUIDANCE, "temperature": 3.4e38},
    {"prompt": "a tree", "guidance_scale": 1e20, "temperature": 1e-10, "top_p": 0.9},
], ids=str)  # fmt: skip
def test_extreme_settings_mean_the_same_to_every_engine(models, options):
    first, *others = (outcome(model, **options) for model in models)
    assert isinstance(first, list) and all(other == first for other in others)


@pytest.mark.parametrize("options", [
    {"temperature": 3.41e38}, {"temperature": 1e39}, {"temperature": 1e300}, {"temperature": 10**400},
    {"guidance_scale": 1.3e30}, {"guidance_scale": 1e38}, {"guidance_scale": 1e300}, {"guidance_scale": 10**5000},
    {"seed": 10**5000}, {"first_index": 2**63 - 1}, {"top_k": -(10**5000)},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_what_float32_or_64_bits_cannot_hold_is_one_error_in_every_engine(models, options):
    first, *others = (outcome(model, prompt="a tree", **options) for model in models)
    assert isinstance(first, str) and first.startswith(next(iter(options))) and all(other == first for other in others)


def test_the_last_index_can_be_drawn(models):
    for model in models:
        tokens = model.sample(1, seed=1, first_index=2**63 - 1, output_type="tokens")
        assert torch.equal(tokens, model.sample(2, seed=1, first_index=2**63 - 2, output_type="tokens")[1:])
        assert torch.equal(tokens, model.fill(torch.full((1, 16), -1), seed=1, first_index=2**63 - 1))
        rows = model.stream(1, seed=1, first_index=2**63 - 1)
        assert torch.equal(tokens, torch.cat([line for _, _, line in rows], 1))


def test_random_extremes_mean_the_same_to_every_engine(models):
    chosen = random.Random(5)

    def number() -> float:
        return chosen.choice([0.0, 1.0, 2.0, 10 ** chosen.uniform(-40, 40), 10 ** chosen.uniform(-323, 308)])

    for _ in range(60):
        options = {"temperature": number(), "top_k": chosen.choice([None, 3, 2**40]), "seed": chosen.randrange(2**64)}
        options |= {"top_p": chosen.choice([None, 1e-30, 0.7]), "first_index": chosen.choice([0, 2**62])}
        if chosen.random() < 0.5:
            options |= {"prompt": "a red tree", "guidance_scale": number()}
        quick = [model for model in models if model.backend != "triton"]
        first, *others = (outcome(model, **options) for model in quick)
        assert all(other == first for other in others), options


# --- the operator ----------------------------------------------------------------------------------------------------


def head(n: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(n, 16, generator=generator), torch.randn(33, 16, generator=generator)
    return hidden, torch.ones(16), weight, torch.arange(n), torch.arange(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operator_draws_the_limit_too(dtype):
    hidden, gain, weight, *ids = head()
    hidden, weight, other = hidden.to(dtype), weight.to(dtype), hidden.flip(0).to(dtype)
    greedy = ops.sample_head(hidden, gain, weight, *ids, 7, temperature=0.0)
    guided = ops.sample_head(hidden, gain, weight, *ids, 7, temperature=0.0, unconditional=other, guidance_scale=1e30)
    for temperature in SMALL:
        assert torch.equal(ops.sample_head(hidden, gain, weight, *ids, 7, temperature=temperature, top_k=9), greedy)
        extreme = {"temperature": temperature, "unconditional": other, "guidance_scale": 1e30}
        assert torch.equal(ops.sample_head(hidden, gain, weight, *ids, 7, **extreme), guided)
    for options in ({"temperature": 1e39}, {"guidance_scale": 1e38}, {"unconditional": other, "guidance_scale": 1e38}):
        with pytest.raises(ValueError, match="must be finite, at least 0 and at most"):
            ops.sample_head(hidden, gain, weight, *ids, 7, **options)


def test_the_operator_never_returns_a_token_that_is_none():
    """Finite logits that overflow on the way: an error, whatever the filters."""
    hidden, gain, weight, *ids = head()
    for scale, options in (
        (1e30, {"temperature": 1e-10}), (1e37, {"unconditional": -hidden, "guidance_scale": 100.0}),
        (1e37, {"unconditional": -hidden, "guidance_scale": 100.0, "temperature": 0.0}),
    ):  # fmt: skip
        for filters in ({}, {"top_k": 5}, {"top_p": 0.5}):
            with pytest.raises(ValueError, match="finite logits"):
                ops.sample_head(hidden, gain, weight * scale, *ids, 7, **options, **filters)


def test_random_extremes_mean_the_same_to_the_operator_and_its_twin():
    chosen, (hidden, gain, weight, *ids) = random.Random(6), head(20)
    without = hidden.flip(0)
    for _ in range(150):
        scale = chosen.choice([None, 0.0, 1.5, 10 ** chosen.uniform(-323, 30)])
        drawing = checked_drawing(
            chosen.randrange(2**64), chosen.choice([0.0, 1.0, 10 ** chosen.uniform(-323, 38.5)]),
            chosen.choice([None, 1, 4, 2**40]), chosen.choice([None, 1e-30, 0.6]), scale,
        )  # fmt: skip
        arguments = (hidden, gain, weight, *ids, None if scale is None else without, drawing, 1e-5)
        got, expected = on_cpu(*arguments), sample_head_reference(*arguments)
        assert (got >= 0).all() and (got != expected).sum() <= 1, drawing
    assert torch.isfinite(filter_logits(guide(hidden, without, MAX_GUIDANCE), Drawing(temperature=1.0))).all()


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [
    (name, kind(value))
    for name, value in (("seed", 7), ("first_index", 3), ("top_k", 2), ("temperature", 2), ("n", 2))
    for kind in (np.int64, torch.tensor, lambda x: torch.tensor([x]), np.array, lambda x: np.array([x], ">i8"))
] + [
    (name, kind(0.5))
    for name in ("temperature", "top_p")
    for kind in (np.float16, np.float64, torch.tensor, np.array, Fraction, Decimal, lambda x: torch.tensor([x]).half())
])  # fmt: skip
def test_numbers_may_be_numpys_or_tensors_of_one_element(name, value):
    model = ImageGPT(TINY, random_weights(TINY), backend="cpu")
    plain = value.item() if hasattr(value, "item") else float(value)
    options = {"n": 2, "seed": 1, "output_type": "tokens"}
    assert torch.equal(model.sample(**options | {name: value}), model.sample(**options | {name: plain}))
    if name in ("seed", "top_k", "temperature", "top_p"):
        options = {"seed": 1}
        got, expected = (ops.sample_head(*head(), **options | {name: x}) for x in (value, plain))
        assert torch.equal(got, expected)


BAD = [True, np.True_, torch.tensor(True), "1", b"1", 1j, np.complex64(1), torch.tensor(1j), [1], np.array([1, 2]),
       torch.tensor([1, 2]), torch.tensor([]), object(), torch.tensor(1.0).to_sparse()]  # fmt: skip


@pytest.mark.parametrize("name", ["seed", "top_k", "temperature", "top_p", "guidance_scale"])
@pytest.mark.parametrize("value", BAD, ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_named(name, value):
    for call in (checked_drawing, lambda **options: ops.sample_head(*head(), **options)):
        with pytest.raises(TypeError, match=f"^{name} must be"):
            call(**{"seed": 0, name: value})


def test_numbers_without_a_value_are_named():
    freed = torch.tensor([1])
    freed.untyped_storage().resize_(0)
    for value in (torch.tensor(1, device="meta"), freed):
        with pytest.raises(ValueError, match="seed must"):
            checked_drawing(value)
    for name, value in (("seed", 1.0), ("top_k", torch.tensor(2.0)), ("top_k", math.nan)):
        with pytest.raises(TypeError, match=f"{name} must be an int"):
            checked_drawing(**{"seed": 0, name: value})


def test_an_operators_seed_is_taken_modulo_64_bits():
    assert torch.equal(ops.sample_head(*head(), 2**64 - 5), ops.sample_head(*head(), -5))
    for seed in (2**64, -(2**63) - 1, 10**5000):
        with pytest.raises(ValueError, match="seed must be between"):
            ops.sample_head(*head(), seed)
