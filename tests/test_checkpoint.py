"""A checkpoint that is right opens everywhere: what was saved here, there, whole, sharded, long ago."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load, model, palette, rewrite, written
from conftest import ODD, PROMPTED, TINY, huggingface_model, random_tokens, random_weights
from safetensors.torch import save_file
from transformers import AutoImageProcessor, ImageGPTForCausalImageModeling

from fastigpt import ImageGPT, ImageGPTConfig


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return written(tmp_path / "model")


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
