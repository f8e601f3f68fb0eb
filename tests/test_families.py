"""config.json decides which family reads a checkpoint, and a model is whatever that hands over."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from blocks import Blocks
from conftest import PROMPTED, TINY, random_weights

import fastigpt
from fastigpt import CheckpointError, ImageGPT, families
from fastigpt.codecs.preprocessing import Preprocessing
from fastigpt.families import image_gpt
from fastigpt.model import Model
from fastigpt.prompts import Vocabulary, WordReader

CLASSES = Vocabulary(("<pad>", "cat", "dog"), 3)


@dataclass
class Painted:
    """What a family of another kind would hand over: no palette, no config that anybody else knows."""

    config: dict
    weights: dict[str, torch.Tensor]

    spec = image_gpt.spec(PROMPTED)
    codec = Blocks(4, 4, PROMPTED.n_colors)
    reader = WordReader(CLASSES, image_gpt.prefix(PROMPTED))
    preprocessing = Preprocessing()
    no_head, no_codec, defaults = None, "", {}

    def canonical(self):
        return self.weights

    def published(self):
        return {"norm": "painted.last_norm"}

    def write(self, folder):
        raise NotImplementedError


def read(folder, files, data):
    weights = image_gpt.canonical(PROMPTED, random_weights(PROMPTED, data["seed"]))
    weights["norm"] = weights["norm"] * data.get("scale", 1)
    return Painted(data, weights)


@pytest.fixture
def painted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    family = SimpleNamespace(WANTED=("strokes.bin",), BELONGS=frozenset({"config.json"}), read=read)
    monkeypatch.setitem(families.FAMILIES, "painted", lambda: family)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "painted", "seed": 5}))
    return tmp_path


def test_an_image_gpt_is_one(tmp_path):
    ImageGPT(TINY, random_weights(TINY), backend="portable").save_pretrained(tmp_path)
    assert type(fastigpt.load(tmp_path)) is ImageGPT
    assert type(Model.from_pretrained(tmp_path)) is ImageGPT


def test_another_family_draws_with_its_own_codec_and_prompts(painted):
    model = fastigpt.load(painted, backend="portable", dtype="float32")
    assert type(model) is Model and model.config["seed"] == 5 and model.spec == image_gpt.spec(PROMPTED)
    twin = ImageGPT(PROMPTED, random_weights(PROMPTED, 5), vocabulary=CLASSES, backend="portable", dtype="float32")
    options = {"prompt": "cat dog", "guidance_scale": 2.0, "seed": 3}
    tokens = model.sample(2, output_type="tokens", **options)
    assert torch.equal(tokens, twin.sample(2, output_type="tokens", **options))
    assert torch.equal(model.logits(tokens, prompt="dog"), twin.logits(tokens, prompt="dog"))
    assert model.sample(2, **options)[0].size == (12, 16)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is Model and torch.equal(again.sample(2, output_type="tokens", **options), tokens)
    assert torch.equal(fastigpt.sample(2, model=painted, backend="portable", dtype="float32", output_type="tokens",
                                       **options), tokens)  # fmt: skip


def test_what_is_wrong_with_weights_is_told_in_the_familys_names(painted):
    (painted / "config.json").write_text(json.dumps({"model_type": "painted", "seed": 5, "scale": 1e7}))
    with pytest.raises(CheckpointError, match=r"painted\.last_norm"):
        fastigpt.load(painted, backend="portable", dtype="float16")


def test_an_image_gpt_is_not_made_of_another_family(painted):
    with pytest.raises(CheckpointError, match=r"holds no ImageGPT; open it with fastigpt\.load"):
        ImageGPT.from_pretrained(painted)


def test_all_families_files_are_asked_for(painted):
    assert {"strokes.bin", "config.json", "preprocessor_config.json"} <= set(families.wanted())


@pytest.mark.parametrize("name", ["gpt2", "", None, 3, ["imagegpt"], "x" * 10**5])
def test_an_unknown_family_is_refused_by_name(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    with pytest.raises(CheckpointError, match=r'json: model_type is .*; the known ones are "imagegpt"') as error:
        fastigpt.load(tmp_path)
    assert len(str(error.value)) < 500
