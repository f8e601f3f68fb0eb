"""The CPU engine draws with the noise and by the formula of sampling.py, on every instruction set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cpu_engines import ISAS

from fastigpt import _C
from fastigpt.sampling import gumbel_noise, noise_bits


@pytest.mark.parametrize("isa", ISAS)
def test_approximate_noise_is_within_its_bound_for_every_input(isa: str) -> None:
    step = 1 << 20
    worst = 0.0
    for first in range(0, 1 << 24, step if isa == ISAS[-1] else 16 * step):
        k = np.arange(first, first + step, dtype=np.uint32)
        got = _C.cpu_gumbel(k << np.uint32(8) | np.uint32(0xA5), isa)
        want = -np.log(-np.log((k + 0.5) * 2.0**-24))
        worst = max(worst, float(np.abs(got - want).max()))
    assert worst < 4e-6  # kNoiseError of csrc/operators/draw_impl.h


@pytest.mark.parametrize("isa", ISAS)
def test_philox_known_answers_decide_the_draw(isa: str) -> None:
    # Random123's vectors: counter and key all zeros; all ones. Words are then the noise of tokens 4·counter … +3.
    words = {0: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)}
    assert tuple(noise_bits(0, torch.tensor(0), torch.tensor(0), 4).tolist()) == words[0]
    noise = [-math.log(-math.log(((w >> 8) + 0.5) * 2.0**-24)) for w in words[0]]
    for a in range(4):
        for b in range(4):
            if a == b:
                continue
            for nudge in (-1e-3, 1e-3):  # which of two wins flips exactly where the noise says
                scores = np.full((1, 4), -np.inf, np.float32)
                scores[0, a], scores[0, b] = 0.0, noise[a] - noise[b] + nudge
                zero = np.zeros(1, np.int64)
                assert _C.cpu_draw(scores, 0, zero, zero, isa)[0] == (b if nudge > 0 else a)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_tokens", [512, 7, 100])
def test_draw_is_the_float64_formula(isa: str, n_tokens: int) -> None:
    rows = 4096 if n_tokens == 512 else 512  # × 512 tokens > 1e6 noises
    torch.manual_seed(n_tokens)
    scores = (
        torch.randn(rows, n_tokens) * torch.tensor([0.0, 1e-6, 1e-3, 1.0, 8.0, 1e4]).repeat(rows // 6 + 1)[:rows, None]
    )
    scores[::3, ::2] = -math.inf
    index = torch.randint(-(2**63), 2**63 - 1, (rows,))
    position = torch.randint(0, 5000, (rows,))
    seed = 0xFEDCBA9876543210
    want = (scores + gumbel_noise(seed, index, position, n_tokens)).argmax(-1)
    got = _C.cpu_draw(scores.numpy(), seed, index.numpy(), position.numpy(), isa)
    assert np.array_equal(got, want.numpy())


def test_draw_breaks_ties_towards_the_lowest_token() -> None:
    # Scores so large that no noise changes them in float32: all tokens tie.
    scores = np.full((1, 512), 2.0**30, np.float32)
    scores[0, :3] = 0
    zero = np.zeros(1, np.int64)
    for isa in ISAS:
        assert _C.cpu_draw(scores, 1, zero, zero, isa)[0] == 3
