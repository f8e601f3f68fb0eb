"""The GPU engine's logic on tiny models: scores and tokens of the reference, whatever the window, the prefix, the
neighbours or the cache.
"""

import dataclasses

import pytest
import torch
from conftest import random_tokens
from drawn import BLOCKS, LLAMA, PROMPTED, SMALL, both, empty, fill, requests, weights_of
from either_way import GPU, device, pytestmark  # noqa: F401
from llama_blocks import llama_weights

pytest.importorskip("triton")

from fastigpt.engine.reference import ReferenceEngine
from fastigpt.engine.triton import TritonEngine
from fastigpt.engine.triton.batch import bucket
from fastigpt.errors import CheckpointError
from fastigpt.families import image_gpt
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.ops.kv_cache import quantize_kv_reference
from fastigpt.sampling import Drawing
from fastigpt.spec import BlockSpec


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("biases", [False, True])
def test_logits_and_hidden_states_equal_the_reference(device, blocks, biases):
    reference, engine = both(BLOCKS[blocks], device, 1, biases)
    tokens = random_tokens(PROMPTED, 3)
    start = PROMPTED.n_words
    for prefix in (None, [[1, 2, start], [0, 0, start], [3, 1, start]], [[1, start]] * 3):
        prefix = None if prefix is None else torch.tensor(prefix)
        for length in (1, PROMPTED.n_pixels):
            logits = engine.logits(tokens[:, :length].contiguous(), prefix)
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits.cpu(), reference.logits(tokens[:, :length], prefix), atol=1e-4, rtol=0)
        for layer in range(PROMPTED.n_layer + 1):
            hidden = engine.hidden(tokens, layer, prefix)
            torch.testing.assert_close(hidden.cpu(), reference.hidden(tokens, layer, prefix), atol=1e-4, rtol=0)


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
    asked = requests(SMALL, empty(SMALL, 2), drawing)
    wanted = fill(reference, asked)
    filled = fill(engine, asked, window=window)
    assert torch.equal(filled.tokens, wanted.tokens)
    passes = filled.pass_starts.sum(1)
    assert filled.pass_starts[:, 0].all() and (passes <= SMALL.n_pixels).all()
    assert window != 1 or filled.pass_starts.all()


@pytest.mark.parametrize("window", [1, 4])
def test_known_tokens_stay_and_equal_requests_share_their_prefix(device, window):
    """Two canvases share a known run of 4, one begins empty, one has nothing to draw, later tokens are known."""
    reference, engine = both(SMALL, device, 3)
    tokens = empty(SMALL, 4)
    tokens[:2, :4] = random_tokens(SMALL, 1, seed=5)[:, :4]
    tokens[3] = random_tokens(SMALL, 1, seed=6)
    tokens[1, 6], tokens[2, 8] = 2, 3
    asked = requests(SMALL, tokens, Drawing(seed=4))
    wanted = fill(reference, asked)
    filled = fill(engine, asked, window=window)
    assert torch.equal(filled.tokens, wanted.tokens)
    assert torch.equal(filled.tokens[tokens >= 0], tokens[tokens >= 0])
    assert not filled.pass_starts[:2, :4].any() and not filled.pass_starts[3].any()


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("scale, window", [(None, 3), (2.0, 1), (2.0, 3)])
def test_prompts_and_guidance_equal_the_reference(device, blocks, scale, window):
    reference, engine = both(BLOCKS[blocks], device, 7)
    tokens = empty(PROMPTED, 3)
    tokens[2, :2] = 1
    asked = requests(PROMPTED, tokens, Drawing(seed=8, guidance_scale=scale), [[1, 2], [1, 2], [3, 0]])
    wanted = fill(reference, asked)
    filled = fill(engine, asked, window=window)
    assert torch.equal(filled.tokens, wanted.tokens)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
def test_greedy_tokens_of_prefixes_of_any_length_equal_the_reference(device, kv_dtype):
    """Guided, each against a prefix of another length, with known tokens; an 8-bit cache may lose a little."""
    reference, engine = both(LLAMA, device, 21, kv_dtype=kv_dtype)
    tokens = empty(PROMPTED, 4)
    tokens[1, :2], tokens[2, 3] = 1, 4
    asked = requests(PROMPTED, tokens, Drawing(temperature=0.0, guidance_scale=1.5))
    prefixes = [((4,), (2, 4)), ((1, 2, 4), (4,)), ((3, 4), (0, 1, 4)), ((2, 4), (2, 4))]
    asked = [dataclasses.replace(each, prefix=own, negative=other) for each, (own, other) in zip(asked, prefixes)]
    filled, wanted = fill(engine, asked, window=3).tokens, fill(reference, asked).tokens
    if kv_dtype == torch.float32:
        assert torch.equal(filled, wanted)
    else:
        assert (filled[:, 0] == wanted[:, 0]).all() and (filled == wanted).float().mean() > 0.7


@pytest.mark.parametrize("blocks", BLOCKS)
def test_int8_weights_are_those_of_the_blocks_rounded(device, blocks):
    spec, weights = weights_of(BLOCKS[blocks], 26)
    engine = TritonEngine(spec, weights, device=device, dtype=torch.int8, configs="interpreter")
    assert engine.dtype == torch.int8 and engine.kv_dtype == engine.model.dtype
    for name, x in weights.items():
        if name.startswith("blocks.") and name.endswith(".weight"):
            stored, scale = quantize_kv_reference(x, torch.int8)
            weights[name] = stored * scale[:, None]
    reference, tokens = ReferenceEngine(spec, weights), random_tokens(PROMPTED, 2)
    for some in (tokens, tokens.repeat(3, 1)):  # by the kernel, and by cuBLAS
        found, wanted = engine.logits(some).cpu(), reference.logits(some)
        if GPU:  # there activations are bfloat16
            assert (found - wanted).norm() < 1e-2 * wanted.norm()
        else:
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    asked = requests(PROMPTED, empty(PROMPTED, 2), Drawing(temperature=0.0, guidance_scale=1.5), [[1, 2], [3, 0]])
    if not GPU:
        assert torch.equal(fill(engine, asked, window=2).tokens, fill(reference, asked).tokens)


HEADS = {
    "64": BlockSpec(2, 2, 64, 24, 1e-6, "gated_silu"),
    "96": BlockSpec(1, 1, 96, 24, 1e-6, "gated_silu"),
    "100": BlockSpec(2, 1, 100, 24, 1e-5, "gated_silu"),
    "128": BlockSpec(1, 1, 128, 24, 1e-6, "quick_gelu"),
}


@pytest.mark.parametrize("head_dim", HEADS)
def test_heads_of_every_width_equal_the_reference(device, head_dim):
    """Also where they do not add up to the model's width, and with a linear head."""
    spec = dataclasses.replace(LLAMA, n_layer=1, width=24, block=HEADS[head_dim], head_inner=None)
    reference, engine = both(spec, device, 22, biases=False)
    assert engine.model.head_dim == {"100": 104}.get(head_dim, int(head_dim))
    tokens = random_tokens(PROMPTED, 2)
    torch.testing.assert_close(engine.logits(tokens).cpu(), reference.logits(tokens), atol=1e-4, rtol=0)
    asked = requests(PROMPTED, empty(PROMPTED, 2), Drawing(seed=5, guidance_scale=2.0), [[1, 2], [1, 2]])
    assert torch.equal(fill(engine, asked, window=2).tokens, fill(reference, asked).tokens)


def test_conditions_whose_turns_are_zero_equal_the_reference(device):
    """As LlamaGen's: their queries and keys are zero, so whoever looks finds all of them alike."""
    weights = llama_weights(LLAMA, 23)
    weights["rotary"][: LLAMA.prefix_length] = 0
    reference = ReferenceEngine(LLAMA, weights)
    engine = TritonEngine(LLAMA, weights, device=device, dtype=torch.float32)
    tokens, prefix = random_tokens(PROMPTED, 2), torch.tensor([[1, 2, 4], [0, 3, 4]])
    found = engine.logits(tokens, prefix).cpu()
    torch.testing.assert_close(found, reference.logits(tokens, prefix), atol=1e-4, rtol=0)


def test_a_draft_of_other_blocks_changes_no_token(device):
    reference, engine = both(LLAMA, device, 24)
    _, draft = both(PROMPTED, device, 25)
    asked = requests(PROMPTED, empty(PROMPTED, 2), Drawing(seed=5, top_k=3), [[1, 2], [3, 0]])
    assert torch.equal(fill(engine, asked, window=3, draft=draft).tokens, fill(reference, asked).tokens)


def test_a_draft_that_is_the_model_itself_guesses_everything(device):
    reference, engine = both(SMALL, device, 14)
    for seed in (3, 4):  # the second job finds the buffers of the first, and the draft's
        asked = requests(SMALL, empty(SMALL, 1), Drawing(seed=seed))
        filled = fill(engine, asked, window=3, draft=engine)
        assert torch.equal(filled.tokens, fill(reference, asked).tokens)
        assert filled.pass_starts.sum() == SMALL.n_pixels // 3
    room = engine.room(guided=False, window=3)
    assert engine.room(guided=False, window=3, draft=engine) < room
    assert engine.room(guided=True, window=3) < room


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
    asked = requests(PROMPTED, tokens, drawing, [[1, 2], [3, 0]])
    wanted = fill(reference, asked)
    filled = fill(engine, asked, window=3, draft=draft)
    assert torch.equal(filled.tokens, wanted.tokens)
    assert (filled.pass_starts.sum(1) < PROMPTED.n_pixels).any()


def test_a_draft_guesses_for_every_pass_or_for_none(device):
    """Its cache has no holes: with a draft no pass scores one token, unless all do."""
    _, engine = both(SMALL, device, 14)
    assert engine.open(1, draft=engine)._tuner.width() == 2
    assert engine.open(1, window=1, draft=engine)._draft is None


def test_drafts_come_from_the_same_backend(device):
    reference, engine = both(SMALL, device, 18)
    with pytest.raises(ValueError, match="triton engines, not from reference"):
        fill(engine, requests(SMALL, empty(SMALL, 1), Drawing()), window=2, draft=reference)


def test_rows_come_in_order_and_a_batch_serves_the_next_session(device):
    reference, engine = both(SMALL, device, 9)
    for seed in (1, 2):  # the second job finds buffers and graphs of the first
        rows: list[tuple[range, int, torch.Tensor]] = []
        asked = requests(SMALL, empty(SMALL, 2), Drawing(seed=seed))
        filled = fill(engine, asked, on_row=lambda *found, rows=rows: rows.append(found))
        assert torch.equal(filled.tokens, fill(reference, asked).tokens)
        assert [(images, row) for images, row, _ in rows] == [(range(2), row) for row in range(SMALL.height)]
        assert torch.equal(torch.cat([tokens.cpu() for _, _, tokens in rows], 1), filled.tokens)
    assert len(engine._pool._idle) == 1


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bit_caches_fill_with_plausible_tokens(device, kv_dtype):
    """Rounding may change a token; what is drawn must still be what the reference finds likely."""
    reference, engine = both(SMALL, device, 10, kv_dtype=kv_dtype)
    tokens = empty(SMALL, 2)
    tokens[:, :3] = 1
    filled = fill(engine, requests(SMALL, tokens, Drawing(temperature=0.0)))
    logits = reference.logits(filled.tokens)[:, 3:]
    lost = logits.max(-1).values - logits.gather(-1, filled.tokens[:, 3:, None])[..., 0]
    assert lost.max() < 0.5


def test_batches_fit_the_memory_there_is(device):
    _, engine = both(SMALL, device, 11)
    room = engine.room(guided=False)
    assert room > 1000 and bucket(room) == room


def test_buckets_are_close_to_what_was_asked_for():
    found = [bucket(n) for n in range(1, 600)]
    assert found[:9] == [1, 2, 4, 4, 8, 8, 8, 8, 10] and found == sorted(found)
    assert all(n <= slots < n * 1.34 for n, slots in enumerate(found[2:], 3) if n not in (5,))
    assert len(set(found)) < 40


def test_prepared_passes_can_be_repeated(device):
    _, engine = both(SMALL, device, 13)
    for window in (1, 3):
        run = engine.prepared_pass(n=2, position=4, window=window)
        run()
        run()


@pytest.mark.parametrize("window", [512, 10**8])
def test_no_window_is_wider_than_helps(device, window):
    """Of whatever was asked for, Triton is asked for what a program has room for."""
    config = ImageGPTConfig(n_layer=1, n_head=1, n_embd=16, height=6, width=8, n_colors=5)
    _, engine = both(config, device, 13)
    assert engine.open(1, window=window)._tuner.width() == 32
    engine.prepared_pass(n=1, position=0, window=window)()


def test_logits_that_are_not_finite_are_an_error(device):
    spec = image_gpt.spec(SMALL)
    _, engine = both(SMALL, device, 20)
    engine.model.head.gain.fill_(float("nan"))
    assert spec == engine.spec
    with pytest.raises(CheckpointError, match="not finite"):
        fill(engine, requests(SMALL, empty(SMALL, 2), Drawing()))


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
