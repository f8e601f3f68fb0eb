"""The CPU engine against the reference engine, and its promise of bitwise independence."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import engine as build
from conftest import prefixes, random_weights
from cpu_engines import ISAS, KINDS, PLAIN, PROMPTED, SHAPES, Case, cpu_engine, empty, random_prompt

from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.sampling import Drawing, draw


@functools.cache
def scored_by_reference(config: ImageGPTConfig):  # type: ignore[no-untyped-def]
    """weights, tokens, prefixes, and for each prefix (logits, hidden states before the first block, after the last)."""
    weights = random_weights(config, biases=True)
    reference = build("reference", config, weights)
    tokens = torch.randint(0, config.n_colors, (3, config.n_pixels))
    read = [None] if (prompt := random_prompt(config, 3)) is None else [None, prefixes(reference, prompt)]
    truth = [
        (reference.logits(tokens, p), reference.hidden(tokens, 0, p), reference.hidden(tokens, config.n_layer, p))
        for p in read
    ]
    return weights, tokens, read, truth


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype,kv_dtype", KINDS)
def test_scores_agree_with_reference(isa: str, dtype: str, kv_dtype: str) -> None:
    for config in SHAPES:
        weights, tokens, read, truth = scored_by_reference(config)
        engine = cpu_engine(config, weights, dtype=dtype, kv_dtype=kv_dtype, isa=isa, threads=2)
        for prefix, (want, first, last) in zip(read, truth):
            got = engine.logits(tokens, prefix)
            kl = (want.softmax(-1) * (want.log_softmax(-1) - got.log_softmax(-1))).sum(-1).mean()
            relative = (got - want).norm() / want.norm()
            if (dtype, kv_dtype) == ("float32", "float32"):
                assert (got - want).abs().max() < 1e-4
            elif "int8" not in (dtype, kv_dtype):
                assert relative < 1e-2 and kl < 1e-3
            else:
                assert relative < 4e-2 and kl < 2e-3
            for layer, a in ((0, first), (config.n_layer, last)):
                b = engine.hidden(tokens, layer, prefix)
                assert (a - b).norm() / a.norm() < (1e-5 if dtype == kv_dtype == "float32" else 5e-2)


@functools.cache
def filled_by_reference() -> list[tuple[ImageGPTConfig, Case, torch.Tensor]]:
    cases = []
    for config in (PLAIN, PROMPTED):
        reference = build("reference", config, random_weights(config))
        known = torch.full((4, config.n_pixels), -1)
        known[:2, :11] = torch.randint(0, config.n_colors, (11,))  # a shared prefix
        known[1, 15:17] = 3  # forced tokens
        known[3, -4:] = 2
        prompt = random_prompt(config, 4)
        if prompt is not None:
            prompt[1] = prompt[0]
        drawings = [Drawing(seed=3), Drawing(seed=4, temperature=0.8, top_k=5, top_p=0.9), Drawing(temperature=0.0)]
        if prompt is not None:
            drawings.append(Drawing(seed=5, guidance_scale=2.5))
        for drawing in drawings:
            case = Case(known, drawing, prompt, 0)
            cases.append((config, case, case.fill(reference).tokens))
    return cases


@pytest.mark.parametrize("isa", ISAS)
def test_tokens_equal_reference_in_float32(isa: str) -> None:
    for config, case, want in filled_by_reference():
        engine = cpu_engine(config, random_weights(config), dtype="float32", isa=isa, threads=2)
        for window in (1, 3, "auto"):
            assert torch.equal(case.fill(engine, window).tokens, want)


@pytest.mark.parametrize(
    "drawing",
    [
        Drawing(seed=9, top_k=3),
        Drawing(seed=9, top_k=1000),
        Drawing(seed=9, top_p=0.5),
        Drawing(seed=9, top_p=1e-6),
        Drawing(seed=9, temperature=0.3, top_k=20, top_p=0.7),
    ],
)
def test_filters_agree_with_sampling(drawing: Drawing) -> None:
    config = SHAPES[2]
    engine = cpu_engine(config, random_weights(config), dtype="float32")
    filled = Case(empty(config, 6), drawing).fill(engine).tokens
    # Teacher forcing: the engine's own logits through sampling.py must give the tokens the engine drew.
    want = draw(engine.logits(filled), torch.arange(6)[:, None] + 5, torch.arange(config.n_pixels), drawing)
    assert torch.equal(filled, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype,kv_dtype", KINDS)
def test_logits_do_not_depend_on_batch_length_or_threads(isa: str, dtype: str, kv_dtype: str) -> None:
    for config in SHAPES:
        weights = random_weights(config)
        one, two = (cpu_engine(config, weights, dtype=dtype, kv_dtype=kv_dtype, isa=isa, threads=t) for t in (1, 2))
        tokens, prompt = torch.randint(0, config.n_colors, (17, config.n_pixels)), random_prompt(config, 17)
        prefix = None if prompt is None else prefixes(one, prompt)
        want = one.logits(tokens, prefix)
        assert torch.equal(two.logits(tokens, prefix), want)
        for n, length in ((1, config.n_pixels), (2, 3), (3, config.n_pixels - 1)):
            part = None if prefix is None else prefix[-n:]
            assert torch.equal(two.logits(tokens[-n:, :length], part), want[-n:, :length])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_row_does_not_depend_on_how_many_are_beside_it(isa: str, dtype: str) -> None:
    """Around every number of rows at which kernels cut them anew, and inputs that no cut divides."""
    for config in (PLAIN, SHAPES[4]):
        engine = cpu_engine(config, random_weights(config, biases=True), dtype=dtype, isa=isa, threads=2)
        pairs = torch.randint(0, config.n_colors, (99, 2))
        alone = torch.cat([engine.logits(pairs[i : i + 1]) for i in range(len(pairs))])
        for n in (2, 6, 7, 8, 9, 12, 13, 15, 16, 17, 24, 25, 31, 32, 33, 48, 49, 63, 64, 65, 97, 99):
            assert torch.equal(engine.logits(pairs[:n]), alone[:n]), n


@pytest.mark.skipif("amx" not in ISAS, reason="the processor has no AMX")
@pytest.mark.parametrize("n", [1, 12, 13, 40])
def test_tiles_of_integers_are_exact(n: int) -> None:
    for config in SHAPES:
        weights = random_weights(config, biases=True)
        tiles, vectors = (cpu_engine(config, weights, dtype="int8", isa=isa) for isa in ("amx", "avx512vnni"))
        tokens = torch.randint(0, config.n_colors, (n, 3))  # without the head, which stays in bfloat16
        assert torch.equal(*(engine.hidden(tokens, config.n_layer) for engine in (tiles, vectors)))


@pytest.mark.parametrize("dtype,kv_dtype", KINDS)
def test_tokens_do_not_depend_on_batch_window_or_threads(dtype: str, kv_dtype: str) -> None:
    for config in (PLAIN, PROMPTED):
        weights = random_weights(config)
        # Sharper logits make guesses right more often, so that windows keep more than one token.
        weights["lm_head.weight"] = weights["lm_head.weight"] * 3
        case = Case(empty(config, 64), prompt=random_prompt(config, 64))
        want = None
        for threads in (1, 2):
            engine = cpu_engine(config, weights, dtype=dtype, kv_dtype=kv_dtype, threads=threads)
            for n in (1, 2, 3, 17, 64):
                for window in (1, 2, 8, 33):
                    filled = case.part(slice(n)).fill(engine, window)
                    if want is None:
                        want = case.fill(engine).tokens
                    assert torch.equal(filled.tokens, want[:n]), (threads, n, window)
                    if window == 1:
                        assert filled.pass_starts.all()


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_shared_prefix_changes_nothing(kv_dtype: str) -> None:
    config = PROMPTED
    engine = cpu_engine(config, random_weights(config), dtype="bfloat16", kv_dtype=kv_dtype, threads=2)
    for known, guidance in ((0, None), (1, 1.5), (14, None), (16, 3.0), (30, None)):
        tokens = torch.full((5, config.n_pixels), -1)
        tokens[:, :known] = torch.randint(0, config.n_colors, (known,))
        prompt = random_prompt(config, 1).expand(5, -1).contiguous()  # type: ignore[union-attr]
        drawing = Drawing(seed=1, guidance_scale=guidance)
        case = Case(tokens, drawing, prompt, 0)
        shared = case.fill(engine).tokens
        assert torch.equal(case.fill(engine, 4).tokens, shared)
        for i in range(5):
            assert torch.equal(case.part(slice(i, i + 1)).fill(engine, 2).tokens, shared[i : i + 1])


def test_random_masks_windows_and_filters_agree_with_one_at_a_time() -> None:
    generator = np.random.default_rng()
    for _ in range(12):
        config = PROMPTED if generator.random() < 0.5 else PLAIN
        weights = random_weights(config)
        weights["lm_head.weight"] = weights["lm_head.weight"] * float(generator.uniform(0.5, 4))
        engine = cpu_engine(config, weights, threads=2)
        n = int(generator.integers(1, 6))
        tokens = torch.randint(0, config.n_colors, (n, config.n_pixels))
        tokens[torch.rand(tokens.shape) < generator.random()] = -1
        prompt = random_prompt(config, n)
        drawing = Drawing(
            seed=int(generator.integers(0, 2**63)),
            temperature=float(generator.choice([0.0, 0.5, 1.0, 1.7])),
            top_k=int(generator.integers(1, 9)) if generator.random() < 0.4 else None,
            top_p=float(generator.uniform(0.2, 1)) if generator.random() < 0.4 else None,
            guidance_scale=2.0 if prompt is not None and generator.random() < 0.5 else None,
        )
        case = Case(tokens, drawing, prompt, 0)
        want = case.fill(engine)
        assert torch.equal(want.tokens[tokens >= 0], tokens[tokens >= 0])
        for window in (int(generator.integers(2, 12)), 300, "auto"):
            got = case.fill(engine, window)
            assert torch.equal(got.tokens, want.tokens)
            assert (got.pass_starts.sum(1) <= want.pass_starts.sum(1)).all()
