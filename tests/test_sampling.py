"""The noise contract bit for bit, and filters and draws held to transformers and to statistics."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastigpt.sampling import (
    Drawing,
    checked_drawing,
    draw,
    filter_logits,
    fresh_seed,
    gumbel_noise,
    noise_bits,
    philox4x32,
)

M = 0xFFFFFFFF
# Known answers of Philox4x32-10 from Random123: (counter, key, result).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((M, M, M, M), (M, M), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# The contract's test vectors: the 32 random bits of tokens 0 … 7 at (seed, image index, position). README of the
# sampling contract quotes them; another implementation is right if it prints the same.
VECTORS = {
    (0, 0, 0): [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8, 0xF8E4CCA4, 0x5CB200DB, 0xB1A574EB, 0x097EFF67],
    (0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3): [
        0x3F6D24D7,
        0x529108A0,
        0xF8A37E29,
        0xE7A9B43B,
        0x14E0A6EA,
        0xBBEA52F1,
        0x89A95D62,
        0xE59911D1,
    ],
    (2**64 - 1, 2**63 - 1, 1023): [
        0x1E4163F1,
        0x949DD992,
        0xCE454B81,
        0x50FD828F,
        0x9E279D69,
        0x26F48C9E,
        0xA781580F,
        0x294D5350,
    ],
}


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_random123s_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("place", VECTORS)
def test_noise_bits_are_the_published_vectors(place):
    seed, index, position = place
    bits = noise_bits(seed, torch.tensor(index), torch.tensor(position), 8)
    assert bits.tolist() == VECTORS[place]


def test_noise_bits_count_as_the_contract_says():
    """Counter = (token // 4, position, index low, index high), key = (seed low, seed high), word token % 4."""
    counter, key, expected = KNOWN_ANSWERS[2]
    seed = key[0] | key[1] << 32
    index = counter[2] | counter[3] << 32
    token = counter[0] * 4  # block 0x243F6A88: too far to enumerate, so ask the block function what it is made of
    assert token // 4 == counter[0]
    words = philox4x32(
        (torch.tensor(3), torch.tensor(counter[1]), torch.tensor(counter[2]), torch.tensor(counter[3])), key
    )
    bits = noise_bits(seed, torch.tensor(index), torch.tensor(counter[1]), 16)
    assert bits[12:].tolist() == [int(w) for w in words]
    assert len(expected) == 4


def test_noise_does_not_depend_on_the_batch_it_is_computed_in():
    index, position = torch.arange(5)[:, None], torch.arange(7)[None]
    together = gumbel_noise(3, index, position, 10)
    for i in range(5):
        for p in range(7):
            assert torch.equal(together[i, p], gumbel_noise(3, torch.tensor(i), torch.tensor(p), 10))


def test_gumbel_noise_is_finite_at_both_ends_and_follows_the_formula():
    noise = gumbel_noise(1, torch.arange(500)[:, None], torch.arange(8), 513)
    assert torch.isfinite(noise).all()
    bits = noise_bits(1, torch.arange(3), torch.tensor(0), 5)
    for i in range(3):
        for t in range(5):
            u = ((int(bits[i, t]) >> 8) + 0.5) / 2**24
            expected = torch.tensor(-math.log(-math.log(u)), dtype=torch.float32)
            assert gumbel_noise(1, torch.tensor(i), torch.tensor(0), 5)[t] == expected
    assert abs(float(noise.mean()) - 0.5772) < 0.01  # Euler's constant
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.02
    largest = -math.log(-math.log((2**24 - 0.5) / 2**24))
    assert float(noise.max()) <= largest + 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 512, 600])
@pytest.mark.parametrize("top_p", [None, 1.0, 0.9, 0.5, 1e-6])
def test_filters_equal_transformers(temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(40, 512, generator=generator) * 3
    logits[::2] = (logits[::2] * 2).round() / 2  # many ties
    expected = TemperatureLogitsWarper(temperature)(None, logits.clone()) if temperature != 1.0 else logits.clone()
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ours = filter_logits(logits, Drawing(temperature=temperature, top_k=top_k, top_p=top_p))
    assert torch.equal(ours[1::2], expected[1::2])
    # Which of several equal logits top-p drops is left to torch.sort there; how many of them is not.
    assert torch.equal(ours.sort(-1).values, expected.sort(-1).values)


def test_top_p_drops_the_lower_of_equal_tokens_first():
    scores = filter_logits(torch.zeros(1, 8), Drawing(top_p=0.55))
    assert torch.isfinite(scores).tolist() == [[False, False, False, True, True, True, True, True]]


def test_filters_always_leave_a_token():
    logits = torch.zeros(3, 8)
    for drawing in (Drawing(top_k=1), Drawing(top_p=1e-9), Drawing(temperature=1e-30, top_p=0.5)):
        kept = torch.isfinite(filter_logits(logits, drawing)).sum(-1)
        assert (kept >= 1).all()


def test_drawn_tokens_follow_the_filtered_distribution():
    logits = torch.tensor([1.5, 0.0, -0.5, 2.0, 1.0, -2.0, 0.3, 0.3])
    drawing = Drawing(seed=11, temperature=0.8, top_k=6, top_p=0.95)
    n = 40_000
    tokens = draw(logits.expand(n, -1), torch.arange(n), torch.tensor(17), drawing)
    probabilities = filter_logits(logits, drawing).softmax(-1)
    counts = torch.bincount(tokens, minlength=8)
    allowed = probabilities > 0
    assert counts[~allowed].sum() == 0
    assert 0 < int((~allowed).sum()) < 7
    assert chisquare(counts[allowed], probabilities[allowed].double() * n / probabilities.double().sum()).pvalue > 1e-3


def test_tokens_of_neighbouring_positions_and_images_are_independent():
    n = 20_000
    logits = torch.zeros(n, 2)
    a = draw(logits, torch.arange(n), torch.tensor(0), Drawing(seed=5))
    b = draw(logits, torch.arange(n), torch.tensor(1), Drawing(seed=5))
    c = draw(logits, torch.arange(n) + 1, torch.tensor(0), Drawing(seed=5))
    for other in (b, c):
        table = torch.bincount(2 * a + other, minlength=4)
        assert chisquare(table).pvalue > 1e-3


def test_ties_go_to_the_lowest_token_and_temperature_zero_is_argmax():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    tokens = draw(logits, torch.arange(2), torch.tensor(0), Drawing(seed=1, temperature=0.0))
    assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("seed", -1, ValueError),
        ("seed", 2**64, ValueError),
        ("seed", 1.5, TypeError),
        ("seed", True, TypeError),
        ("temperature", -0.1, ValueError),
        ("temperature", math.nan, ValueError),
        ("temperature", math.inf, ValueError),
        ("temperature", "hot", TypeError),
        ("top_k", 0, ValueError),
        ("top_k", 2.0, TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.1, ValueError),
        ("top_p", math.nan, ValueError),
        ("guidance_scale", -1.0, ValueError),
        ("guidance_scale", math.nan, ValueError),
    ],
)
def test_impossible_settings_are_refused_by_name(argument, value, error):
    with pytest.raises(error, match=argument):
        checked_drawing(**{"seed": 0, argument: value})


def test_fresh_seeds_differ_and_fit():
    seeds = {fresh_seed() for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)
