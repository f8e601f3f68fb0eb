"""The public surface: what sample, complete, fill, generate and the scores promise, on every engine."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import skimage.data
import torch
from conftest import PROMPTED, TINY, huggingface_model, random_tokens, random_weights
from PIL import Image

import fastigpt
from fastigpt import ImageGPT, ImageGPTConfig, Palette
from fastigpt.prompts import Vocabulary

VOCABULARY = Vocabulary(("<pad>", "a", "red", "house", "tree"), 3)


def palette(n_colors: int) -> Palette:
    return Palette(np.random.default_rng(1).uniform(-1, 1, (n_colors, 3)).astype(np.float32))


def make(config: ImageGPTConfig, backend: str, seed: int = 0) -> ImageGPT:
    vocabulary = VOCABULARY if config.n_words else None
    weights = random_weights(config, seed)
    return ImageGPT(config, weights, palette=palette(config.n_colors), vocabulary=vocabulary, backend=backend)


@pytest.fixture
def model(backend: str) -> ImageGPT:
    return make(TINY, backend)


@pytest.fixture
def prompted(backend: str) -> ImageGPT:
    return make(PROMPTED, backend)


@pytest.fixture(scope="module")
def bundled() -> ImageGPT:
    return fastigpt.load()


# --- sample ------------------------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_images_however_the_job_is_cut(model):
    tokens = model.sample(20, seed=5, output_type="tokens")
    assert torch.equal(tokens, model.sample(20, seed=5, output_type="tokens"))
    assert torch.equal(tokens, model.sample(20, seed=5, output_type="tokens", batch_size=7))
    assert torch.equal(tokens, model.sample(20, seed=5, output_type="tokens", batch_size=1, window=4))
    for k in (0, 3, 19):
        assert torch.equal(tokens[k], model.sample(1, seed=5, first_index=k, output_type="tokens")[0])
    assert not torch.equal(tokens, model.sample(20, seed=6, output_type="tokens"))


def test_output_types_show_the_same_images(model):
    tokens = model.sample(3, seed=1, output_type="tokens")
    arrays = model.sample(3, seed=1, output_type="np")
    tensors = model.sample(3, seed=1, output_type="pt")
    pictures = model.sample(3, seed=1)
    assert tokens.dtype == torch.int64 and tokens.shape == (3, 16)
    assert arrays.dtype == np.uint8 and arrays.shape == (3, 4, 4, 3)
    assert tensors.dtype == torch.uint8 and tensors.shape == (3, 3, 4, 4)
    assert np.array_equal(arrays, model.decode(tokens))
    assert np.array_equal(tensors.movedim(1, -1).numpy(), arrays)
    assert all(np.array_equal(np.asarray(p), a) for p, a in zip(pictures, arrays))


def test_a_seed_that_was_drawn_is_reported_and_repeats_the_images(model):
    pictures, stats = model.sample(2, return_stats=True, first_index=4)
    assert pictures[0].info["seed"] == str(stats.seed) and pictures[1].info["index"] == "5"
    again = model.sample(2, seed=stats.seed, first_index=4, output_type="np")
    assert np.array_equal(again[1], np.asarray(pictures[1]))
    assert model.sample(1, return_stats=True)[1].seed != stats.seed


def test_stats_count_the_passes(model):
    _, stats = model.sample(3, seed=0, window=1, return_stats=True)
    assert stats.passes.tolist() == [16, 16, 16]
    assert stats.pass_starts.shape == (3, 4, 4) and stats.seconds > 0


def test_stats_tell_tokens_and_seconds_per_pass(model):
    known = random_tokens(TINY, 2)
    known[:, 5:] = -1
    _, stats = model.fill(known, seed=0, window=1, return_stats=True, batch_size=1)
    assert stats.tokens_per_pass == 1 and stats.batch == 1 and int(stats.drawn.sum()) == 22
    assert stats.seconds_per_pass == pytest.approx(stats.seconds / 2 / 11)
    _, wide = model.sample(8, temperature=0.0, window=8, seed=0, return_stats=True)
    assert wide.tokens_per_pass == pytest.approx(16 / float(wide.passes.double().mean()))


def test_a_draft_changes_no_token_and_must_fit(tmp_path):
    large, small = make(TINY, "portable"), make(TINY, "portable", seed=9)
    small.save_pretrained(tmp_path / "small")
    expected = large.sample(4, seed=3, output_type="tokens")
    for draft in (small, tmp_path / "small", str(tmp_path / "small")):
        assert torch.equal(large.sample(4, seed=3, output_type="tokens", draft=draft, window=4), expected)
    assert torch.equal(fastigpt.sample(4, model=large, seed=3, output_type="tokens", draft=small), expected)
    other = make(ImageGPTConfig(n_layer=1, n_head=1, n_embd=8, height=3, width=5, n_colors=9), "portable")
    with pytest.raises(ValueError, match="draft draws 3×5"):
        large.sample(1, draft=other)
    recoloured = ImageGPT(TINY, random_weights(TINY), palette=Palette(-palette(9).clusters), backend="portable")
    with pytest.raises(ValueError, match="another palette"):
        large.sample(1, draft=recoloured)
    with pytest.raises(ValueError, match="draft runs on reference"):
        large.sample(1, draft=make(TINY, "reference"))
    with pytest.raises(fastigpt.CheckpointError):
        large.sample(1, draft=tmp_path / "missing")


def test_row_callbacks_cover_a_job_that_slots_take_in_turns(model):
    seen: dict[tuple[int, int], torch.Tensor] = {}

    def on_row(images: range, row: int, tokens: torch.Tensor) -> None:
        for i, line in zip(images, tokens):
            assert (i, row) not in seen
            seen[i, row] = line.clone()

    tokens = model.fill(torch.full((5, 16), -1), seed=0, batch_size=2, on_row=on_row)
    assert set(seen) == {(i, row) for i in range(5) for row in range(4)}
    assert all(torch.equal(seen[i, row], tokens[i, row * 4 : row * 4 + 4]) for i, row in seen)


def test_a_progress_bar_is_shown_when_asked_for_and_not_in_a_pipe(model, capfd):
    model.sample(2, seed=0)
    assert capfd.readouterr().err == ""
    model.sample(2, seed=0, progress=True)
    assert "image" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"n": 0}, ValueError, "n must be"),
        ({"n": -3}, ValueError, "n must be"),
        ({"n": 2.5}, TypeError, "n must be"),
        ({"n": True}, TypeError, "n must be"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"top_p": 0}, ValueError, "top_p"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"seed": -1}, ValueError, "seed"),
        ({"first_index": -1}, ValueError, "first_index"),
        ({"first_index": 2**63}, ValueError, "first_index"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"window": 0}, ValueError, "window"),
        ({"window": "wide"}, ValueError, "window"),
        ({"output_type": "jpeg"}, ValueError, "output_type"),
        ({"prompt": "a house"}, ValueError, "reads no text"),
        ({"guidance_scale": 2.0}, ValueError, "prompt"),
    ],
)
def test_impossible_arguments_are_refused_by_name(model, arguments, error, word):
    with pytest.raises(error, match=word):
        model.sample(**arguments)


# --- complete and fill -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 3, 4])
def test_complete_keeps_the_known_rows_exactly(model, rows):
    photo = Image.fromarray(skimage.data.chelsea())
    known = model.encode(photo)[0]
    results = model.complete(photo, 5, rows=rows, seed=2, output_type="tokens")
    assert results.shape == (5, 16)
    assert (results[:, : rows * 4] == known[: rows * 4]).all()
    if rows < 4:
        assert len(torch.unique(results, dim=0)) > 1


def test_complete_keeps_what_a_mask_leaves_and_numbers_its_results(model):
    photos = [Image.fromarray(skimage.data.chelsea()), Image.fromarray(skimage.data.astronaut())]
    rng = np.random.default_rng(3)
    mask = rng.random((2, 4, 4)) < 0.5
    tokens = model.encode(photos)
    results = model.complete(photos, 3, mask=mask, seed=2, first_index=10, output_type="tokens")
    kept = torch.from_numpy(~mask).flatten(1)
    assert torch.equal(model.known_cells(photos, mask=mask), kept)
    for i in range(2):
        for j in range(3):
            result = results[i * 3 + j]
            assert torch.equal(result[kept[i]], tokens[i][kept[i]])
            alone = tokens[i].masked_fill(~kept[i], -1)[None]
            assert torch.equal(model.fill(alone, seed=2, first_index=10 + i * 3 + j)[0], result)


def test_complete_draws_transparent_parts_anew(model):
    array = np.array(Image.fromarray(skimage.data.chelsea()).resize((4, 4)).convert("RGBA"))
    array[2:, :, 3] = 0
    image = Image.fromarray(array)
    known = model.encode(image)[0]
    results = model.complete(image, 4, seed=0, output_type="tokens")
    assert (results[:, :8] == known[:8]).all()


def test_complete_asks_what_to_draw(model):
    photo = Image.fromarray(skimage.data.chelsea())
    with pytest.raises(ValueError, match="rows=, mask="):
        model.complete(photo)
    with pytest.raises(ValueError, match="not both"):
        model.complete(photo, rows=1, mask=np.zeros((4, 4), bool))
    with pytest.raises(ValueError, match="rows must be"):
        model.complete(photo, rows=5)
    with pytest.raises(ValueError, match="mask is 5 × 5"):
        model.complete(photo, mask=np.zeros((5, 5), bool))


@pytest.mark.parametrize(
    ("tokens", "error", "word"),
    [
        (torch.full((2, 15), -1), ValueError, "16 tokens"),
        (torch.full((2, 17), -1), ValueError, "16 tokens"),
        (torch.full((16,), -1), ValueError, "shape"),
        (torch.full((0, 16), -1), ValueError, "shape"),
        (torch.full((1, 16), 9), ValueError, "between -1 and 8"),
        (torch.full((1, 16), -2), ValueError, "between -1 and 8"),
        (torch.full((1, 16), -1, dtype=torch.int32), TypeError, "int32"),
        (torch.full((1, 16), -1.0), TypeError, "float32"),
        ([[0] * 16], TypeError, "list"),
    ],
)
def test_fill_refuses_impossible_tokens(model, tokens, error, word):
    with pytest.raises(error, match=word):
        model.fill(tokens)


# --- prompts -----------------------------------------------------------------------------------------------------


def test_prompts_one_for_all_or_one_for_each(prompted):
    same = prompted.sample(3, prompt="a red house", seed=1, output_type="tokens")
    each = prompted.sample(3, prompt=["a red house", "tree", "A RED, house!"], seed=1, output_type="tokens")
    assert torch.equal(same[0], each[0]) and torch.equal(same[2], each[2])
    assert not torch.equal(same, prompted.sample(3, seed=1, output_type="tokens"))
    guided = prompted.sample(3, prompt="a red house", guidance_scale=1.0, seed=1, output_type="tokens")
    assert torch.equal(guided, same)  # u + 1·(c − u) = c, up to rounding that these tokens survive


@pytest.mark.parametrize(
    ("prompt", "error", "word"),
    [
        ("", ValueError, "no words"),
        ("a red red house", ValueError, "at most 3"),
        ("a red horse", ValueError, "house"),
        (["tree"], ValueError, "1 entries for 2"),
        ([1, 2], TypeError, "string"),
    ],
)
def test_impossible_prompts_are_refused(prompted, prompt, error, word):
    with pytest.raises(error, match=word):
        prompted.sample(2, prompt=prompt)


# --- generate ----------------------------------------------------------------------------------------------------


def test_generate_is_transformers_generate(backend):
    weights = random_weights(TINY)
    ours = ImageGPT(TINY, weights, backend=backend, dtype="float32", kv_dtype="float32")
    theirs = huggingface_model(TINY, weights)
    ids = torch.tensor([[9, 1, 2], [9, 4, 4]])
    for limit in ({"max_length": 17}, {"max_length": 8}, {"max_new_tokens": 5}):
        expected = theirs.generate(ids, do_sample=False, pad_token_id=0, eos_token_id=None, **limit)
        assert torch.equal(ours.generate(ids, **limit), expected)
    assert ours.generate(ids).shape == (2, 17)
    many = ours.generate(ids, do_sample=True, num_return_sequences=3, seed=4, max_length=9, top_k=5)
    assert many.shape == (6, 9) and (many[:3, :3] == ids[0]).all() and (many[3:, :3] == ids[1]).all()
    generator = torch.Generator().manual_seed(1)
    first = ours.generate(ids, do_sample=True, generator=generator)
    second = ours.generate(ids, do_sample=True, generator=generator)
    again = ours.generate(ids, do_sample=True, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize(
    ("ids", "arguments", "word"),
    [
        (torch.tensor([[0, 1]]), {}, "start token, 9"),
        (torch.tensor([[9, 1]]), {"max_length": 18}, "max_length"),
        (torch.tensor([[9, 1]]), {"max_length": 2}, "max_length"),
        (torch.tensor([[9, 1]]), {"max_new_tokens": 16}, "max_new_tokens"),
        (torch.tensor([[9, 1]]), {"max_length": 5, "max_new_tokens": 3}, "not both"),
        (torch.tensor([[9, 1]]), {"num_return_sequences": 2}, "num_return_sequences"),
        (torch.tensor([[9, 9]]), {}, "between 0 and 8"),
        (torch.full((1, 17), 9), {}, "1 to 16"),
    ],
)
def test_generate_refuses_impossible_arguments(model, ids, arguments, word):
    with pytest.raises(ValueError, match=word):
        model.generate(ids, **arguments)


# --- scores ------------------------------------------------------------------------------------------------------


def test_nll_is_the_mean_cross_entropy_of_the_logits(model):
    tokens = random_tokens(TINY, 20)
    logits = model.logits(tokens).double()
    picked = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(model.nll(tokens).double(), -picked.mean(1), atol=1e-5)
    assert model.nll(tokens).shape == (20,) and model.nll(tokens).dtype == torch.float32


def test_features_are_mean_pooled_hidden_states(model):
    photo = Image.fromarray(skimage.data.chelsea())
    tokens = model.encode(photo)
    for layer in range(TINY.n_layer + 1):
        states = model.features(photo, layer, pool=None)
        assert states.shape == (1, 16, 16)
        assert torch.allclose(model.features(tokens, layer), states.mean(1), atol=1e-6)
    assert torch.equal(model.features(tokens), model.features(tokens, TINY.n_layer // 2))
    with pytest.raises(ValueError, match="layer"):
        model.features(tokens, 3)
    with pytest.raises(ValueError, match="pool"):
        model.features(tokens, pool="max")


def test_encode_and_decode_round_trip_palette_colours(model):
    tokens = random_tokens(TINY, 3)
    assert torch.equal(model.encode(model.decode(tokens)), tokens)
    with pytest.raises(ValueError, match="tokens"):
        model.decode(torch.full((1, 16), 9))


def test_threads_can_share_a_model(model):
    expected = [model.sample(4, seed=s, output_type="tokens") for s in range(4)]
    found: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        found[seed] = model.sample(4, seed=seed, output_type="tokens")

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[s], expected[s]) for s in range(4))


# --- the package's own model -------------------------------------------------------------------------------------


def test_the_bundled_model_is_what_sample_uses_and_it_says_so(bundled):
    (picture,) = fastigpt.sample(1, seed=3)
    assert "bundled" in picture.info["model"] and picture.size == (32, 32)
    assert np.array_equal(np.asarray(picture), bundled.sample(1, seed=3, output_type="np")[0])


def test_a_loaded_model_cannot_be_moved_by_sample(model):
    assert len(fastigpt.sample(2, model=model, seed=0)) == 2
    with pytest.raises(ValueError, match="loaded already"):
        fastigpt.sample(1, model=model, dtype="bfloat16")


def test_unknown_backends_devices_and_dtypes_are_refused():
    for argument, value in (("backend", "turbo"), ("device", "tpu9"), ("dtype", "float7"), ("kv_dtype", "bits")):
        with pytest.raises(ValueError, match=argument):
            fastigpt.load(**{argument: value})
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA"):
            fastigpt.load(device="cuda")


def test_random_models_have_the_shape_that_was_asked_for():
    config = ImageGPTConfig(n_layer=1, n_head=2, n_embd=8, height=6, width=5)
    model = ImageGPT.from_config(config, seed=3)
    assert model.sample(1, seed=0, output_type="np").shape == (1, 6, 5, 3)
    same, other = ImageGPT.from_config(config, seed=3), ImageGPT.from_config(config, seed=4)
    tokens = random_tokens(config, 1)
    assert torch.equal(model.logits(tokens), same.logits(tokens))
    assert not torch.equal(model.logits(tokens), other.logits(tokens))
