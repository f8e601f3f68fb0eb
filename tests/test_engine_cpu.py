"""The CPU engine against the reference engine and the noise contract, and its promise of bitwise independence."""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import engine as build
from conftest import fill, prefixes, random_weights, requests

from fastigpt import _C, CheckpointError
from fastigpt.engine import loop
from fastigpt.engine.cpu import CpuEngine
from fastigpt.families import image_gpt
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.sampling import Drawing, draw, gumbel_noise, noise_bits

ISAS = _C.supported_isas()
KINDS = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
    ("int8", "int8"),
    ("float32", "bfloat16"),
]
SHAPES = [
    ImageGPTConfig(2, 2, 128, height=6, width=9, n_colors=100),  # head_dim 64
    ImageGPTConfig(1, 2, 192, height=4, width=5, n_colors=512),  # 96
    ImageGPTConfig(1, 2, 256, height=5, width=8, n_colors=512, n_words=4, prompt_length=3),  # 128
    ImageGPTConfig(3, 3, 15, n_inner=7, height=4, width=9, n_colors=7, n_words=5, prompt_length=19),  # 5
    ImageGPTConfig(2, 1, 40, n_inner=33, height=7, width=3, n_colors=65),  # 40
]
PLAIN, PROMPTED = SHAPES[0], SHAPES[3]


def random_prompt(config: ImageGPTConfig, n: int) -> torch.Tensor | None:
    return torch.randint(0, config.n_words, (n, config.prompt_length)) if config.n_words else None


def cpu_engine(config: ImageGPTConfig, weights: dict[str, torch.Tensor], **options: object) -> CpuEngine:
    return CpuEngine(image_gpt.spec(config), image_gpt.canonical(config, weights), **options)  # type: ignore[arg-type]


def empty(config: ImageGPTConfig, n: int) -> torch.Tensor:
    return torch.full((n, config.n_pixels), -1)


class Case(NamedTuple):
    """Canvases whose image indices count from 5, as the helpers of conftest take them."""

    tokens: torch.Tensor
    drawing: Drawing = Drawing(seed=77)
    prompt: torch.Tensor | None = None
    first_index: int = 5

    def fill(self, engine, window=1):  # type: ignore[no-untyped-def]
        return fill(engine, self.tokens, self.drawing, prompt=self.prompt, first_index=self.first_index, window=window)

    def part(self, some: slice) -> Case:
        prompt = None if self.prompt is None else self.prompt[some]
        return Case(self.tokens[some], self.drawing, prompt, self.first_index + (some.start or 0))


# --- the noise contract ---------------------------------------------------------------------------------------------


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


# --- parity with the reference --------------------------------------------------------------------------------------


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


# --- bitwise independence -------------------------------------------------------------------------------------------


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


# --- the job's manners ----------------------------------------------------------------------------------------------


def test_rows_are_reported_once_in_order_and_final() -> None:
    config = PLAIN
    engine = cpu_engine(config, random_weights(config))
    for window in (1, 5):
        seen = []
        filled = fill(engine, empty(config, 3), window=window, on_row=lambda *row, seen=seen: seen.append(row))
        assert [row for _, row, _ in seen] == list(range(config.height))
        for images, row, tokens in seen:
            assert images == range(3)
            assert torch.equal(tokens, filled.tokens[:, row * config.width : (row + 1) * config.width])


def test_a_known_canvas_takes_no_pass() -> None:
    config = PLAIN
    tokens = torch.randint(0, config.n_colors, (2, config.n_pixels))
    filled = fill(cpu_engine(config, random_weights(config)), tokens)
    assert torch.equal(filled.tokens, tokens) and not filled.pass_starts.any()


def test_an_exception_in_the_callback_comes_out_and_leaves_the_engine_usable() -> None:
    config = PLAIN
    engine = cpu_engine(config, random_weights(config))
    want = fill(engine, empty(config, 2)).tokens

    def stop(images: range, row: int, tokens: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(engine, empty(config, 2), on_row=stop)
    assert torch.equal(fill(engine, empty(config, 2)).tokens, want)


def test_the_callback_may_use_the_engine() -> None:
    config = PLAIN
    engine = cpu_engine(config, random_weights(config), threads=2)
    tokens = torch.randint(0, config.n_colors, (1, 9))
    want, seen = engine.logits(tokens), []
    fill(engine, empty(config, 2), on_row=lambda *_: seen.append(engine.logits(tokens)))
    assert len(seen) == config.height and all(torch.equal(s, want) for s in seen)


def test_python_threads_may_share_an_engine() -> None:
    config = PLAIN
    engine = cpu_engine(config, random_weights(config), threads=2)
    cases = [Case(empty(config, n), Drawing(seed=n)) for n in (1, 2, 3, 4)]
    want, got = [case.fill(engine).tokens for case in cases], [None] * 4
    threads = [threading.Thread(target=lambda i=i: got.__setitem__(i, cases[i].fill(engine).tokens)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_room_is_what_fits() -> None:
    config = ImageGPTConfig.preset("small")
    tiny = cpu_engine(PLAIN, random_weights(PLAIN))
    assert tiny.room(guided=False) > 64
    per_image = 2 * config.n_layer * config.n_pixels * config.n_embd * 2
    assert 64 * per_image < 4e9  # 64 images of small in bfloat16 fit 4 GB


def test_more_slots_than_are_of_use_take_no_memory() -> None:
    """A job of many images goes through the few slots that keep all threads busy, unless it is told otherwise."""
    engine = cpu_engine(PLAIN, random_weights(PLAIN), threads=3)
    enough = engine.enough(guided=False)
    assert enough == max(
        16, 3 * 8, -(-8 * engine.describe()["weight_bytes"] // engine._model.cache_bytes(engine.spec.context))
    )
    assert engine.enough(guided=True) <= enough
    many = requests(engine, empty(PLAIN, 3 * enough), Drawing(seed=0))
    assert loop.slots_for(engine, many, batch_size=None) == enough
    assert loop.slots_for(engine, many[:5], batch_size=None) == 5
    assert loop.slots_for(engine, many, batch_size=2 * enough) == 2 * enough
    assert cpu_engine(PLAIN, random_weights(PLAIN), threads=20).enough(guided=False) >= 160
    image_gpt_small = 152e6 / (4 * 24 * 512 * 1024)  # bfloat16: weights in caches of one slot
    assert 16 < 8 * image_gpt_small < 64


# --- bad input ------------------------------------------------------------------------------------------------------


def test_bad_weights_are_refused() -> None:
    config = PLAIN
    spec, weights = image_gpt.spec(config), image_gpt.canonical(config, random_weights(config))
    name = "blocks.1.fc.weight"
    with pytest.raises(ValueError, match="lack " + name):
        CpuEngine(spec, {k: v for k, v in weights.items() if k != name})
    with pytest.raises(ValueError, match="shape"):
        CpuEngine(spec, {**weights, name: weights[name].T.contiguous()})
    with pytest.raises(TypeError, match=name):
        CpuEngine(spec, {**weights, name: weights[name].to(torch.int64)})
    with pytest.raises(ValueError, match="does not know"):
        CpuEngine(spec, {**weights, "blocks.9.norm_1": weights["norm"]})
    for bad in (math.nan, math.inf):
        broken = weights[name].clone()
        broken[3, 5] = bad
        with pytest.raises(ValueError, match="finite"):
            CpuEngine(spec, {**weights, name: broken})


def test_bad_settings_are_refused() -> None:
    config, weights = PLAIN, random_weights(PLAIN)
    settings = {"dtype": "bf17", "kv_dtype": torch.float64, "isa": "sse9", "threads": 0}
    for name, bad in settings.items():
        with pytest.raises(ValueError, match=name):
            cpu_engine(config, weights, **{name: bad})


def test_bad_requests_are_refused() -> None:
    config = PROMPTED
    engine = cpu_engine(config, random_weights(config))
    (good,) = requests(engine, empty(config, 1), prompt=random_prompt(config, 1))
    with pytest.raises(TypeError, match="tokens"):
        loop.run(engine, [replace(good, tokens=good.tokens.float())])
    for name, bad in {"index": 0.5, "prefix": ("a",)}.items():
        with pytest.raises(TypeError, match=name):
            loop.run(engine, [replace(good, **{name: bad})])
    for name, bad in {
        "tokens": torch.full((config.n_pixels,), config.n_colors),
        "prefix": (config.n_words + 1,) * 2,
        "drawing": Drawing(temperature=math.nan),
    }.items():
        with pytest.raises(ValueError, match="temperature" if name == "drawing" else name):
            loop.run(engine, [replace(good, **{name: bad})])
    for prefix in ((), (0,) * (config.prompt_length + 2)):
        with pytest.raises(ValueError, match="prefix"):
            loop.run(engine, [replace(good, prefix=prefix)])
    with pytest.raises(ValueError, match="window"):
        loop.run(engine, [good], window=0)
    with pytest.raises(ValueError, match="negative"):
        loop.run(engine, [replace(good, drawing=Drawing(guidance_scale=2.0))])
    with pytest.raises(ValueError, match="guidance_scale"):
        loop.run(engine, [replace(good, negative=engine.spec.unconditional)])
    with pytest.raises(ValueError, match="tokens"):
        engine.logits(torch.full((1, 3), -1))
    with pytest.raises(ValueError, match="tokens"):
        engine.logits(torch.zeros(1, config.n_pixels + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="prefix"):
        engine.logits(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="prefix"):
        engine.logits(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(TypeError, match="prefix"):
        engine.logits(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="layer"):
        engine.hidden(torch.zeros(1, 4, dtype=torch.int64), config.n_layer + 1)


def test_a_model_that_overflows_raises() -> None:
    config = PLAIN
    weights = random_weights(config)
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], 3e38)
    with pytest.raises(CheckpointError, match="finite"):
        fill(cpu_engine(config, weights, dtype="float32"), empty(config, 1))
