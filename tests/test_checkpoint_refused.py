"""Checkpoints come from strangers: every way they can be wrong is told by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load, model, refuse, rewrite, written
from conftest import PROMPTED, TINY, random_weights
from safetensors.torch import load_file, save_file

import fastigpt
from fastigpt import CheckpointError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return written(tmp_path / "model")


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
