"""The GPU engine's logic on tiny models: scores and tokens of the reference, whatever the window, the prefix or the
cache.
"""

import dataclasses
import gc
import weakref

import pytest
import torch
from conftest import random_tokens, random_weights
from either_way import GPU, device, pytestmark  # noqa: F401

pytest.importorskip("triton")

from fastigpt.config import ImageGPTConfig
from fastigpt.engine import Drawing, Job
from fastigpt.engine.reference import ReferenceEngine
from fastigpt.engine.triton import TritonEngine

SMALL = ImageGPTConfig(n_layer=1, n_head=2, n_embd=16, height=3, width=3, n_colors=7)
PROMPTED = ImageGPTConfig(
    n_layer=2, n_head=1, n_embd=16, n_inner=20, height=2, width=3, n_colors=5, n_words=4, prompt_length=2
)


def both(config, device, seed, biases=True, **options):
    weights = random_weights(config, seed=seed, biases=biases)
    options = {"dtype": torch.float32, **options}
    return ReferenceEngine(config, weights), TritonEngine(config, weights, device=device, **options)


def job(tokens, drawing, window=1, source=None, prompt=None, first_index=2**33):
    n = len(tokens)
    source = torch.zeros(n, dtype=torch.int64) if source is None else torch.tensor(source)
    return Job(tokens, torch.arange(n) + first_index, source, prompt, drawing, window)


def empty(config, n):
    return torch.full((n, config.n_pixels), -1)


@pytest.mark.parametrize("biases", [False, True])
def test_logits_and_hidden_states_equal_the_reference(device, biases):
    reference, engine = both(PROMPTED, device, 1, biases)
    tokens = random_tokens(PROMPTED, 3)
    for prompt in (None, torch.tensor([[1, 2], [0, 0], [3, 1]])):
        for length in (1, PROMPTED.n_pixels):
            logits = engine.logits(tokens[:, :length].contiguous(), prompt)
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits.cpu(), reference.logits(tokens[:, :length], prompt), atol=1e-4, rtol=0)
        for layer in range(PROMPTED.n_layer + 1):
            hidden = engine.hidden(tokens, layer, prompt)
            torch.testing.assert_close(hidden.cpu(), reference.hidden(tokens, layer, prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "drawing, window",
    [
        (Drawing(seed=1), 1),
        (Drawing(seed=1), "auto"),
        (Drawing(seed=2**64 - 1, temperature=0.8, top_k=4, top_p=0.9), 3),
    ],
    ids=str,
)
def test_samples_equal_the_reference(device, window, drawing):
    reference, engine = both(SMALL, device, 2)
    wanted = reference.fill(job(empty(SMALL, 2), drawing))
    filled = engine.fill(job(empty(SMALL, 2), drawing, window))
    assert torch.equal(filled.tokens, wanted.tokens)
    passes = filled.pass_starts.sum(1)
    assert filled.pass_starts[:, 0].all() and (passes <= SMALL.n_pixels).all()
    assert window != 1 or filled.pass_starts.all()


@pytest.mark.parametrize("window", [1, 4])
def test_known_tokens_stay_and_sources_share_their_prefix(device, window):
    """Two images share a known run of 4, one begins empty, one has nothing to draw, and some later tokens are known."""
    reference, engine = both(SMALL, device, 3)
    tokens = empty(SMALL, 4)
    tokens[:2, :4] = random_tokens(SMALL, 1, seed=5)[:, :4]
    tokens[3] = random_tokens(SMALL, 1, seed=6)
    tokens[1, 6], tokens[2, 8] = 2, 3
    wanted = reference.fill(job(tokens, Drawing(seed=4)))
    filled = engine.fill(job(tokens, Drawing(seed=4), window, source=[0, 0, 1, 2]))
    assert torch.equal(filled.tokens, wanted.tokens)
    assert torch.equal(filled.tokens[tokens >= 0], tokens[tokens >= 0])
    assert not filled.pass_starts[:2, :4].any() and not filled.pass_starts[3].any()


@pytest.mark.parametrize("scale, window", [(None, 3), (2.0, 1), (2.0, 3)])
def test_prompts_and_guidance_equal_the_reference(device, scale, window):
    reference, engine = both(PROMPTED, device, 7)
    prompt = torch.tensor([[1, 2], [1, 2], [3, 0]])
    tokens = empty(PROMPTED, 3)
    tokens[2, :2] = 1
    drawing = Drawing(seed=8, guidance_scale=scale)
    wanted = reference.fill(job(tokens, drawing, prompt=prompt))
    filled = engine.fill(job(tokens, drawing, window, source=[0, 0, 1], prompt=prompt))
    assert torch.equal(filled.tokens, wanted.tokens)


def test_a_draft_that_is_the_model_itself_guesses_everything(device):
    reference, engine = both(SMALL, device, 14)
    for seed in (3, 4):  # the second job finds the buffers of the first, and the draft's
        asked = job(empty(SMALL, 1), Drawing(seed=seed), 3)
        drafted = dataclasses.replace(asked, draft=engine)
        filled = engine.fill(drafted)
        assert torch.equal(filled.tokens, reference.fill(asked).tokens)
        assert filled.pass_starts.sum() == SMALL.n_pixels // 3
    assert engine.max_batch(drafted) < engine.max_batch(dataclasses.replace(drafted, draft=None))


@pytest.mark.parametrize("readable", [True, False])
def test_a_draft_changes_no_token(device, readable):
    """Of another shape, with words, guidance and known tokens; a draft that cannot read the words does without."""
    reference, engine = both(PROMPTED, device, 15)
    words = {"n_words": 4, "prompt_length": 2} if readable else {}
    other = ImageGPTConfig(n_layer=1, n_head=2, n_embd=16, height=2, width=3, n_colors=5, **words)
    _, draft = both(other, device, 16)
    tokens = empty(PROMPTED, 2)
    tokens[1, :2], tokens[0, 3] = 1, 4
    drawing = Drawing(seed=17, guidance_scale=1.5, top_k=4)
    asked = job(tokens, drawing, 3, source=[0, 1], prompt=torch.tensor([[1, 2], [3, 0]]))
    wanted = reference.fill(asked)
    filled = engine.fill(dataclasses.replace(asked, draft=draft))
    assert torch.equal(filled.tokens, wanted.tokens)
    assert (filled.pass_starts.sum(1) < PROMPTED.n_pixels).any()


def test_drafts_come_from_the_same_backend(device):
    reference, engine = both(SMALL, device, 18)
    with pytest.raises(ValueError, match="triton engines, not from reference"):
        engine.fill(dataclasses.replace(job(empty(SMALL, 1), Drawing(), 2), draft=reference))


def test_rows_come_in_order_and_a_session_serves_the_next_job(device):
    reference, engine = both(SMALL, device, 9)
    for seed in (1, 2):  # the second job finds buffers and graphs of the first
        rows: list[tuple[range, int, torch.Tensor]] = []
        filled = engine.fill(job(empty(SMALL, 2), Drawing(seed=seed)), lambda *found, rows=rows: rows.append(found))
        assert torch.equal(filled.tokens, reference.fill(job(empty(SMALL, 2), Drawing(seed=seed))).tokens)
        assert [(images, row) for images, row, _ in rows] == [(range(2), row) for row in range(SMALL.height)]
        assert torch.equal(torch.cat([tokens.cpu() for _, _, tokens in rows], 1), filled.tokens)
    assert len(engine._idle) == 1


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bit_caches_fill_with_plausible_tokens(device, kv_dtype):
    """Rounding may change a token; what is drawn must still be what the reference finds likely."""
    reference, engine = both(SMALL, device, 10, kv_dtype=kv_dtype)
    tokens = empty(SMALL, 2)
    tokens[:, :3] = 1
    filled = engine.fill(job(tokens, Drawing(temperature=0.0)))
    logits = reference.logits(filled.tokens)[:, 3:]
    lost = logits.max(-1).values - logits.gather(-1, filled.tokens[:, 3:, None])[..., 0]
    assert lost.max() < 0.5


def test_memory_is_free_as_soon_as_nobody_needs_it(device):
    """Without the garbage collector: a GPU that is full does not call it."""
    _, engine = both(SMALL, device, 19)
    tokens = random_tokens(SMALL, 1)
    tokens[:, -1] = -1
    gc.collect()
    gc.disable()
    try:
        engine.fill(dataclasses.replace(job(tokens, Drawing(), 2), draft=engine))
        session = weakref.ref(next(iter(engine._idle.values())))
        cache = weakref.ref(session().cache.k)
        engine._forget_oldest()
        assert session() is None and cache() is None
        run, engine = engine.prepared_pass(n=1, position=2), weakref.ref(engine)
        run()
        del run
        assert engine() is None
    finally:
        gc.enable()


def test_batches_fit_the_memory_there_is(device):
    _, engine = both(SMALL, device, 11)
    assert engine.max_batch(job(empty(SMALL, 2), Drawing())) > 1000


def test_prepared_passes_can_be_repeated(device):
    _, engine = both(SMALL, device, 13)
    for window in (1, 3):
        run = engine.prepared_pass(n=2, position=4, window=window)
        run()
        run()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": torch.float64}, "float64"),
        ({"kv_dtype": torch.uint8}, "uint8"),
        pytest.param(
            {"dtype": torch.bfloat16}, "bfloat16", marks=pytest.mark.skipif(GPU, reason="a GPU computes bfloat16")
        ),
    ],
)
def test_impossible_dtypes_are_refused(device, options, message):
    with pytest.raises(ValueError, match=message):
        both(SMALL, device, 12, **options)
