"""Checkpoints come from strangers: every way they can be wrong is told by name, and what is right opens everywhere."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ODD, PROMPTED, TINY, huggingface_model, random_tokens, random_weights
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, ImageGPTForCausalImageModeling

import fastigpt
from fastigpt import CheckpointError, ImageGPT, ImageGPTConfig, Palette
from fastigpt.prompts import Vocabulary


def palette(n_colors: int) -> Palette:
    return Palette(np.random.default_rng(0).uniform(-1, 1, (n_colors, 3)).astype(np.float32))


def model(config: ImageGPTConfig = TINY, **kwargs) -> ImageGPT:
    vocabulary = Vocabulary(("<pad>", "a", "red", "house", "tree"), 3) if config.n_words else None
    weights = random_weights(config, biases=kwargs.pop("biases", False))
    return ImageGPT(config, weights, palette=palette(config.n_colors), vocabulary=vocabulary, backend="portable")


def load(folder: Path | str, **kwargs) -> ImageGPT:
    """In float32, where logits can be compared to the bit."""
    return ImageGPT.from_pretrained(folder, backend="portable", **kwargs)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    model().save_pretrained(folder)
    return folder


def refuse(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ImageGPT.from_pretrained(folder)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not named in: {caught.value}"


def rewrite(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


# --- what must work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("config", [TINY, ODD, PROMPTED], ids=["tiny", "odd", "prompted"])
def test_a_saved_model_comes_back_the_same(tmp_path, config, biases):
    before = model(config, biases=biases)
    before.save_pretrained(tmp_path / "m")
    after = load(tmp_path / "m")
    assert after.config == config and after.palette == before.palette and after.vocabulary == before.vocabulary
    tokens = random_tokens(config, 2)
    assert torch.equal(before.logits(tokens), after.logits(tokens))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]  # no temporary files beside it


def test_others_can_read_what_was_saved(saved):
    mask = os.umask(0)
    os.umask(mask)
    assert {oct(path.stat().st_mode & 0o777) for path in saved.iterdir()} == {oct(0o666 & ~mask)}
    assert saved.stat().st_mode & 0o777 == 0o777 & ~mask


def test_saving_over_an_older_checkpoint_replaces_it(saved):
    other = ImageGPT(TINY, random_weights(TINY, seed=5), backend="portable")
    other.save_pretrained(saved)
    assert torch.equal(load(saved).logits(random_tokens(TINY, 1)), other.logits(random_tokens(TINY, 1)))


def test_transformers_opens_what_we_save(saved):
    theirs = ImageGPTForCausalImageModeling.from_pretrained(saved).eval()
    tokens = random_tokens(TINY, 2)
    start = torch.full((2, 1), TINY.start_token)
    with torch.inference_mode():
        expected = theirs(torch.cat([start, tokens[:, :-1]], 1)).logits
    assert (load(saved).logits(tokens) - expected).abs().max() <= 1e-4
    processor = AutoImageProcessor.from_pretrained(saved)
    assert np.allclose(np.asarray(processor.clusters), palette(TINY.n_colors).clusters)
    assert (processor.size["height"], processor.size["width"]) == (4, 4)


def test_a_prompted_model_is_a_plain_image_gpt_to_transformers(tmp_path):
    model(PROMPTED).save_pretrained(tmp_path / "m")
    theirs = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "m").eval()
    tokens = random_tokens(PROMPTED, 1)
    with torch.inference_mode():
        expected = theirs(torch.cat([torch.tensor([[PROMPTED.start_token]]), tokens[:, :-1]], 1)).logits
    assert (load(tmp_path / "m").logits(tokens) - expected).abs().max() <= 1e-4


def test_what_transformers_saves_opens_here(tmp_path):
    theirs = huggingface_model(TINY, random_weights(TINY, biases=True))
    theirs.save_pretrained(tmp_path / "m")
    ours = load(tmp_path / "m")
    assert torch.equal(ours.logits(random_tokens(TINY, 1)), model(biases=True).logits(random_tokens(TINY, 1)))
    assert ours.palette is None
    with pytest.raises(ValueError, match="no palette"):
        ours.sample(1)
    assert ours.sample(1, output_type="tokens").shape == (1, 16)


def test_sharded_safetensors_and_sharded_pickles(tmp_path):
    weights = random_weights(TINY)
    names = sorted(weights)
    for kind, save in ((".safetensors", save_file), (".bin", torch.save)):
        folder = tmp_path / kind
        model().save_pretrained(folder)
        (folder / "model.safetensors").unlink()
        stem = "model" if kind == ".safetensors" else "pytorch_model"
        index = {}
        for i, part in enumerate((names[:5], names[5:])):
            file = f"{stem}-{i + 1:05d}-of-00002{kind}"
            save({name: weights[name] for name in part}, folder / file)
            index.update(dict.fromkeys(part, file))
        (folder / f"{stem}{kind}.index.json").write_text(json.dumps({"weight_map": index}))
        loaded = load(folder)
        assert torch.equal(loaded.logits(random_tokens(TINY, 1)), model().logits(random_tokens(TINY, 1)))


def test_an_old_pickle_with_mask_buffers_and_zero_biases(saved):
    weights = random_weights(TINY)
    old = {**weights, **{name: torch.zeros(shape) for name, shape in TINY.bias_shapes().items()}}
    for i in range(TINY.n_layer):
        old[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
        old[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    (saved / "model.safetensors").unlink()
    torch.save(old, saved / "pytorch_model.bin")
    rewrite(saved, bos_token_id=50256, eos_token_id=50256)
    loaded = load(saved)
    assert set(loaded.weights) == set(weights)
    assert torch.equal(loaded.logits(random_tokens(TINY, 1)), model().logits(random_tokens(TINY, 1)))


@pytest.mark.parametrize("name", ["clusters.npy", "kmeans_centers.npy"])
def test_the_palette_may_be_an_array(saved, name):
    (saved / "preprocessor_config.json").unlink()
    np.save(saved / name, palette(9).clusters)
    assert load(saved).palette == palette(9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_dtypes(saved, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(TINY).items()}
    save_file(weights, saved / "model.safetensors")
    logits = load(saved, dtype="float32").logits(random_tokens(TINY, 1))
    assert (logits - model().logits(random_tokens(TINY, 1))).abs().max() < 0.1


def test_a_hub_id_is_read_from_huggingface_hubs_cache(saved, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--tiny" / "snapshots" / "0123"
    shutil.copytree(saved, snapshot)
    (cache / "models--someone--tiny" / "refs").mkdir()
    (cache / "models--someone--tiny" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    loaded = load("someone/tiny", local_files_only=True)
    assert loaded.name == "someone/tiny" and loaded.config == TINY


@pytest.mark.parametrize("name", ["small", "medium", "large", "xl"])
@pytest.mark.parametrize("resolution", [32, 48, 64])
def test_presets_have_the_published_sizes(name, resolution):
    config = ImageGPTConfig.preset(name, resolution=resolution)
    assert (config.height, config.width, config.n_colors) == (resolution, resolution, 512)
    published = {"small": 76e6, "medium": 455e6, "large": 1362e6, "xl": 6801e6}[name]
    assert config.n_parameters() == pytest.approx(published, rel=0.03)
    assert ImageGPTConfig.from_json(config.to_json()) == config


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="small, medium, large, xl"):
        ImageGPTConfig.preset("tiny")


# --- what must not -----------------------------------------------------------------------------------------------


def test_missing_places(tmp_path):
    refuse(tmp_path / "nothing", "nothing")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "config.json is missing")
    (tmp_path / "file").write_text("x")
    refuse(tmp_path / "file", "is a file")
    for name in ("someone/not-in-the-cache", "not a model id", "a/b/c/d", ""):
        with pytest.raises(CheckpointError):
            load(name, local_files_only=True)


def test_no_weights(saved):
    (saved / "model.safetensors").unlink()
    refuse(saved, "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("keep", [0, 7, 200, 0.5, 0.999])
def test_truncated_safetensors(saved, keep):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    refuse(saved, "model.safetensors")


@pytest.mark.parametrize("keep", [0, 7, 200, 0.5, 0.999])
def test_truncated_pickles(saved, keep):
    path = saved / "pytorch_model.bin"
    torch.save(random_weights(TINY), path)
    (saved / "model.safetensors").unlink()
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    refuse(saved, "pytorch_model.bin")


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_does_not(saved, tmp_path, zipped):
    touched = tmp_path / "touched"
    (saved / "model.safetensors").unlink()
    hostile = {"lm_head.weight": Hostile(touched)}
    if zipped:
        torch.save(hostile, saved / "pytorch_model.bin")
    else:
        (saved / "pytorch_model.bin").write_bytes(pickle.dumps(hostile))
    refuse(saved, "pytorch_model.bin")
    assert not touched.exists()
    pickle.loads(pickle.dumps(hostile))
    assert touched.exists()  # it would have


def test_a_pickle_of_something_else(saved):
    (saved / "model.safetensors").unlink()
    torch.save([torch.zeros(3)], saved / "pytorch_model.bin")
    refuse(saved, "dictionary")


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../../x.safetensors"}}'])
def test_damaged_or_hostile_shard_indexes(saved, index):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(index)
    refuse(saved, "model.safetensors.index.json")


def test_a_shard_that_is_missing(saved):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "gone.safetensors"}}')
    refuse(saved, "gone.safetensors")


def change_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = {key: value.clone() for key, value in weights.items()}
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.wpe.weight"])
def test_missing_tensors_are_named(saved, name):
    change_tensor(saved, name, None)
    refuse(saved, name, "lacks")


def test_misshapen_integer_and_non_finite_tensors_are_named(saved):
    original = load_file(saved / "model.safetensors")["transformer.h.0.ln_1.weight"].clone()
    for bad, word in (
        (torch.ones(17), "[17]"),
        (torch.ones(16, dtype=torch.int64), "int64"),
        (torch.full((16,), float("nan")), "NaN"),
        (torch.full((16,), float("inf")), "NaN or infinite"),
    ):
        change_tensor(saved, "transformer.h.0.ln_1.weight", bad)
        refuse(saved, "transformer.h.0.ln_1.weight", word)
    change_tensor(saved, "transformer.h.0.ln_1.weight", original)
    load(saved)


def test_tensors_that_no_image_gpt_has_are_told_and_passed_over(saved):
    change_tensor(saved, "score.weight", torch.ones(3))
    with pytest.warns(UserWarning, match=r"score\.weight"):
        load(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"imagegpt"', "\x00\xff"])
def test_configs_that_are_not_json_objects(saved, text):
    (saved / "config.json").write_text(text)
    refuse(saved, "config.json")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"n_head": 3}, "n_head"),
        ({"n_layer": -1}, "n_layer"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_layer": 2.0}, "n_layer"),
        ({"n_layer": True}, "n_layer"),
        ({"n_embd": "16"}, "n_embd"),
        ({"n_embd": None}, "n_embd"),
        ({"vocab_size": 12}, "transformer.wte.weight has the shape [10, 16]"),
        ({"vocab_size": 1}, "vocab_size"),
        ({"n_positions": 25}, "n_positions"),
        ({"n_positions": 0}, "n_positions"),
        ({"fastigpt": {"height": 5, "width": 5}}, "5 × 5"),
        ({"fastigpt": {"height": 4.0, "width": 4}}, "height"),
        ({"fastigpt": {"n_words": 5}}, "canvas"),
        ({"fastigpt": [1]}, "fastigpt"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
        ({"activation_function": "gelu"}, "activation_function"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"n_inner": -3}, "n_inner"),
    ],
)
def test_impossible_configs(saved, changes, word):
    if changes == {"fastigpt": {"n_words": 5}}:
        word = "prompt_length"
    rewrite(saved, **changes)
    refuse(saved, word)


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
def test_missing_config_values_are_named(saved, key):
    config = json.loads((saved / "config.json").read_text())
    del config[key]
    (saved / "config.json").write_text(json.dumps(config))
    refuse(saved, key)


@pytest.mark.parametrize(
    ("clusters", "word"),
    [
        ([[float("nan")] * 3] * 9, "finite"),
        ([[0.0] * 4] * 9, "shape"),
        ([0.0] * 27, "shape"),
        ([[0.0] * 3] * 8, "8 colours"),
        ([], "shape"),
        ("red", ""),
        ([[0, 0, 0], [1]], ""),
    ],
)
def test_bad_palettes(saved, clusters, word):
    processor = json.loads((saved / "preprocessor_config.json").read_text())
    processor["clusters"] = clusters
    (saved / "preprocessor_config.json").write_text(json.dumps(processor))
    refuse(saved, "preprocessor_config.json", word)


def test_a_palette_array_that_would_run_code_does_not(saved, tmp_path):
    (saved / "preprocessor_config.json").unlink()
    touched = tmp_path / "touched"
    np.save(saved / "clusters.npy", np.array([Hostile(touched)], dtype=object), allow_pickle=True)
    refuse(saved, "clusters.npy")
    assert not touched.exists()


def test_a_prompted_model_needs_its_words(tmp_path):
    folder = tmp_path / "m"
    model(PROMPTED).save_pretrained(folder)
    text = (folder / "prompt.json").read_text()
    for bad in ("{", "[]", '{"words": [], "max_words": 3}', text.replace('"tree"', '"tree", "cat"')):
        (folder / "prompt.json").write_text(bad)
        refuse(folder, "prompt.json")
    (folder / "prompt.json").unlink()
    refuse(folder, "prompt.json is missing")


def test_a_failed_save_leaves_nothing_behind_and_the_old_one_intact(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastigpt.families.image_gpt.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        model().save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_saving_to_an_impossible_place(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        model().save_pretrained(tmp_path / "file")


def test_a_model_that_was_named_is_never_replaced_by_the_bundled_one(tmp_path):
    with pytest.raises(CheckpointError):
        fastigpt.sample(1, model=tmp_path / "no-such-model")
