"""What every engine promises, run on each of them: the reference's logits and tokens, whatever the batch or the
window."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import HEAD_DIM_96, ODD, PROMPTED, TINY, engine, fill, prefixes, random_tokens, random_weights

from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.sampling import Drawing

CONFIGS = {"tiny": TINY, "odd": ODD, "prompted": PROMPTED, "head_dim_96": HEAD_DIM_96}
SETTINGS = [
    Drawing(seed=1),
    Drawing(seed=2**64 - 1, temperature=0.7, top_k=4),
    Drawing(seed=3, temperature=1.3, top_p=0.8),
    Drawing(seed=4, top_k=6, top_p=0.9),
    Drawing(temperature=0.0),
]


def holes(config: ImageGPTConfig, n: int, share: float, seed: int) -> torch.Tensor:
    """Random tokens of which about this share is unknown."""
    unknown = torch.rand(n, config.n_pixels, generator=torch.Generator().manual_seed(seed)) < share
    return random_tokens(config, n, seed).masked_fill(unknown, -1)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("shape", CONFIGS)
def test_logits_and_hidden_states_equal_the_reference(backend, shape, biases):
    config = CONFIGS[shape]
    weights = random_weights(config, seed=11, biases=biases)
    truth = engine("reference", config, weights)
    tested = engine(backend, config, weights, dtype="float32", kv_dtype="float32")
    for n, length in ((1, 1), (2, config.n_pixels - 1), (3, config.n_pixels)):
        tokens = random_tokens(config, n, seed=length)[:, :length].contiguous()
        read = [None]
        if config.n_words:
            read.append(prefixes(tested, torch.randint(0, config.n_words, (n, config.prompt_length))))
        for prefix in read:
            logits = tested.logits(tokens, prefix)
            assert logits.dtype == torch.float32 and logits.shape == (n, length, config.n_colors)
            assert (logits - truth.logits(tokens, prefix)).abs().max() <= 1e-4
            for layer in range(config.n_layer + 1):
                hidden = tested.hidden(tokens, layer, prefix)
                assert hidden.shape == (n, length, config.n_embd)
                assert (hidden - truth.hidden(tokens, layer, prefix)).abs().max() <= 1e-4


@pytest.mark.parametrize("drawing", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", ["tiny", "odd"])
def test_samples_equal_the_reference(backend, shape, drawing):
    config = CONFIGS[shape]
    weights = random_weights(config, seed=12, biases=True)
    tokens = torch.full((5, config.n_pixels), -1)
    truth = fill(engine("reference", config, weights), tokens, drawing, first_index=2**33)
    tested = engine(backend, config, weights, dtype="float32", kv_dtype="float32")
    for window in (1, 2, 5, 33, "auto"):
        filled = fill(tested, tokens, drawing, first_index=2**33, window=window)
        assert torch.equal(filled.tokens, truth.tokens), f"window {window}"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("window", [1, 3, 8, "auto"])
def test_known_tokens_stay_and_the_rest_equals_the_reference(backend, window, share):
    config = ODD
    weights = random_weights(config, seed=13)
    tokens = holes(config, 6, share, seed=int(share * 100))
    tokens[0] = random_tokens(config, 1, seed=9)[0]  # nothing to draw
    tokens[1, :] = -1
    tokens[2, -1] = 3  # a known end
    drawing = Drawing(seed=21)
    truth = fill(engine("reference", config, weights), tokens, drawing)
    tested = engine(backend, config, weights, dtype="float32", kv_dtype="float32")
    filled = fill(tested, tokens, drawing, window=window)
    known = tokens >= 0
    assert torch.equal(filled.tokens[known], tokens[known])
    assert torch.equal(filled.tokens, truth.tokens)


@pytest.mark.parametrize("known", [0, 1, 7, 15, 16])
def test_images_with_the_same_prefix_share_it_and_differ_after_it(backend, known):
    weights = random_weights(TINY, seed=14)
    tokens = torch.full((7, TINY.n_pixels), -1)
    tokens[:4, :known] = random_tokens(TINY, 1, seed=1)[:, :known]
    tokens[4:, :known] = random_tokens(TINY, 1, seed=2)[:, :known]
    drawing = Drawing(seed=31)
    truth = fill(engine("reference", TINY, weights), tokens, drawing)
    tested = engine(backend, TINY, weights, dtype="float32", kv_dtype="float32")
    for window in (1, 4):
        filled = fill(tested, tokens, drawing, window=window)
        assert torch.equal(filled.tokens, truth.tokens)


@pytest.mark.parametrize("scale", [None, 0.0, 1.0, 2.5])
def test_prompts_and_guidance_equal_the_reference(backend, scale):
    weights = random_weights(PROMPTED, seed=15)
    tokens = holes(PROMPTED, 4, 0.8, seed=3)
    prompt = torch.tensor([[1, 2, 0], [1, 2, 0], [3, 4, 1], [0, 0, 0]])
    drawing = Drawing(seed=41, guidance_scale=scale)
    truth = fill(engine("reference", PROMPTED, weights), tokens, drawing, prompt=prompt)
    tested = engine(backend, PROMPTED, weights, dtype="float32", kv_dtype="float32")
    for window in (1, 3, "auto"):
        filled = fill(tested, tokens, drawing, prompt=prompt, window=window)
        assert torch.equal(filled.tokens, truth.tokens)
    if scale == 0.0:  # u + 0·(c − u) is the model without a prompt
        without = fill(tested, tokens, Drawing(seed=41))
        assert torch.equal(without.tokens, truth.tokens)


def test_an_image_does_not_depend_on_its_neighbours(backend):
    weights = random_weights(HEAD_DIM_96, seed=16)
    tested = engine(backend, HEAD_DIM_96, weights, dtype="float32", kv_dtype="float32")
    tokens = torch.full((17, HEAD_DIM_96.n_pixels), -1)
    drawing = Drawing(seed=51)
    together = fill(tested, tokens, drawing).tokens
    for k in (0, 5, 16):
        alone = fill(tested, tokens[:1], drawing, first_index=k).tokens
        assert torch.equal(alone[0], together[k])
    assert len(torch.unique(together, dim=0)) == 17


def test_rows_are_reported_once_in_order_and_final(backend):
    weights = random_weights(ODD, seed=17)
    tested = engine(backend, ODD, weights)
    for window in (1, 4, "auto"):
        rows: list[tuple[range, int, torch.Tensor]] = []
        tokens = holes(ODD, 3, 0.7, seed=5)
        filled = fill(
            tested,
            tokens,
            Drawing(seed=61),
            window=window,
            on_row=lambda images, row, tokens, rows=rows: rows.append((images, row, tokens.clone())),
        )
        assert [row for _, row, _ in rows] == list(range(ODD.height))
        assert all(images == range(3) for images, _, _ in rows)
        assert torch.equal(torch.cat([tokens for _, _, tokens in rows], 1), filled.tokens)


def test_an_error_in_a_callback_comes_back_and_the_engine_still_works(backend):
    weights = random_weights(TINY, seed=18)
    tested = engine(backend, TINY, weights)
    tokens = torch.full((2, TINY.n_pixels), -1)
    expected = fill(tested, tokens, Drawing(seed=1)).tokens

    def fail(images: range, row: int, tokens: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tested, tokens, Drawing(seed=1), on_row=fail)
    assert torch.equal(fill(tested, tokens, Drawing(seed=1)).tokens, expected)


def test_passes_are_counted(backend):
    weights = random_weights(TINY, seed=19)
    tested = engine(backend, TINY, weights)
    tokens = torch.full((4, TINY.n_pixels), -1)
    one = fill(tested, tokens, Drawing(seed=71))
    assert one.pass_starts.all()
    tokens[:, :5] = 1
    wide = fill(tested, tokens, Drawing(temperature=0.0), window=8)
    assert wide.pass_starts[:, 5].all() and not wide.pass_starts[:, :5].any()
    passes = wide.pass_starts.sum(1)
    assert ((passes >= -(-(TINY.n_pixels - 5) // 8)) & (passes <= TINY.n_pixels - 5)).all()


def test_threads_can_share_an_engine(backend):
    weights = random_weights(TINY, seed=20)
    tested = engine(backend, TINY, weights)
    tokens = torch.full((3, TINY.n_pixels), -1)
    expected = [fill(tested, tokens, Drawing(seed=s)).tokens for s in range(4)]
    results: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        for _ in range(5):
            results[seed] = fill(tested, tokens, Drawing(seed=seed)).tokens

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert torch.equal(results[seed], expected[seed])


def test_bfloat16_stays_within_its_contract(backend):
    """Relative L2 of the logits ≤ 1e-2; the KL bound of the contract is tested on the bundled model."""
    config = ImageGPTConfig(n_layer=4, n_head=4, n_embd=128, height=8, width=8)
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(config, seed=22).items()}
    tokens = random_tokens(config, 2)
    truth = engine("reference", config, weights).logits(tokens)
    logits = engine(backend, config, weights, dtype="bfloat16").logits(tokens)
    assert 0 < (logits - truth).norm() / truth.norm() <= 1e-2


def test_impossible_dtypes_are_refused(backend):
    with pytest.raises(ValueError, match="float64"):
        engine(backend, TINY, random_weights(TINY), dtype="float64")


@pytest.mark.parametrize("window", [1, 3])
def test_prepared_passes_can_be_repeated_and_disturb_nothing(backend, window):
    weights = random_weights(TINY, seed=23)
    tested = engine(backend, TINY, weights)
    tokens = torch.full((2, TINY.n_pixels), -1)
    expected = fill(tested, tokens, Drawing(seed=1)).tokens
    for n, position in ((1, 0), (3, 7), (2, TINY.n_pixels - window)):
        work = tested.prepared_pass(n=n, position=position, window=window)
        for _ in range(3):
            work()
    assert torch.equal(fill(tested, tokens, Drawing(seed=1)).tokens, expected)


@pytest.mark.parametrize("shape", ["tiny", "prompted"])
def test_a_draft_changes_no_token(backend, shape):
    """Whatever the draft guesses: another model's guesses, the model's own, with prompts it can or cannot read."""
    config = CONFIGS[shape]
    weights = random_weights(config, seed=24)
    smaller = ImageGPTConfig(n_layer=1, n_head=1, n_embd=8, height=4, width=4, n_colors=9)
    tested = engine(backend, config, weights, dtype="float32", kv_dtype="float32")
    drafts = [
        engine(backend, smaller, random_weights(smaller, seed=25), dtype="float32", kv_dtype="float32"),
        tested,
    ]
    tokens = holes(config, 5, 0.8, seed=6)
    tokens[0] = -1
    prompt = torch.tensor([[1, 2, 0]] * 5) if config.n_words else None
    drawing = Drawing(seed=81, top_k=7, guidance_scale=1.5 if config.n_words else None)
    truth = fill(engine("reference", config, weights), tokens, drawing, prompt=prompt)
    passes = []
    for draft in drafts:
        for window in (1, 2, 4, 7):
            filled = fill(tested, tokens, drawing, prompt=prompt, window=window, draft=draft)
            assert torch.equal(filled.tokens, truth.tokens), f"window {window}"
            passes.append(int(filled.pass_starts[0].sum()))
    # A model that drafts for itself is always right: every pass keeps its whole window.
    assert passes[-4:] == [16, 8, 4, 3]


@pytest.mark.parametrize("engine_name, allowed", [
    ("reference", "float32 or float64"), ("portable", "float32, bfloat16 or float16"),
])  # fmt: skip
def test_a_dtype_an_engine_does_not_compute_in_is_refused(engine_name, allowed):
    weights = random_weights(TINY)
    with pytest.raises(ValueError, match=f"^dtype must be {allowed} on the {engine_name} engine, not torch.int8"):
        engine(engine_name, TINY, weights, dtype="int8")
    with pytest.raises(ValueError, match=f"^kv_dtype must be float32 on the {engine_name} engine in float32"):
        engine(engine_name, TINY, weights, dtype="float32", kv_dtype="int8")
