"""The CPU engine reports, stops, shares and refuses as every engine does."""

from __future__ import annotations

import itertools
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import fill, random_weights, requests
from cpu_engines import PLAIN, PROMPTED, Case, cpu_engine, empty, random_prompt

import fastigpt
from fastigpt import CheckpointError
from fastigpt.engine import loop
from fastigpt.engine.cpu import CpuEngine
from fastigpt.families import image_gpt
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.sampling import Drawing
from fastigpt.scenes import scenes


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


def test_known_tokens_here_and_there_do_not_keep_windows_narrow() -> None:
    """Widths have to be tried to be chosen, however many known tokens lie between the unknown ones."""
    model = fastigpt.load(device="cpu", backend="cpu")
    tokens = model.encode(np.stack([image for image, *_ in itertools.islice(scenes(3), 8)]))
    tokens[:, ::2] = -1
    drawn, narrow = model.fill(tokens, seed=0, window=1, return_stats=True)
    again, stats = model.fill(tokens, seed=0, return_stats=True)
    assert torch.equal(again, drawn) and int(stats.passes.sum()) < int(narrow.passes.sum())


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
