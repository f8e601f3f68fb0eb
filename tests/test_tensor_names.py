"""Checkpoints whose tensor names differ by a wrapper's prefix, that have no head, or more positions than pixels."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import CACHED, TINY, random_tokens, random_weights
from safetensors.torch import load_file, save_file
from transformers import ImageGPTConfig as HfConfig
from transformers import ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel

from fastigpt import CheckpointError, ImageGPT

CONFIG = HfConfig(vocab_size=10, n_positions=16, n_embd=16, n_layer=2, n_head=2)


def config_of(positions: int) -> HfConfig:
    return HfConfig(vocab_size=10, n_positions=positions, n_embd=16, n_layer=1, n_head=1)


def renamed(folder: Path, rename) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def load(folder: Path, backend: str = "portable") -> ImageGPT:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ImageGPT.from_pretrained(folder, backend=backend, device="cpu", dtype="float32")


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: "module." + name,
        lambda name: "_orig_mod." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: "_orig_mod.module.module." + name,
        lambda name: "_fsdp_wrapped_module." + name,
        lambda name: "model." + name,
        lambda name: "net.module." + name,
        lambda name: name.replace("transformer.", "transformer._orig_mod."),
        lambda name: name.replace(".attn", "._orig_mod.attn").replace(".mlp", "._checkpoint_wrapped_module.mlp"),
        lambda name: "module." + name.removeprefix("transformer."),
        lambda name: name.removeprefix("transformer."),
    ],
)
def test_prefixes_of_wrappers_are_passed_over(tmp_path, rename, pickled):
    torch.manual_seed(0)
    theirs = ImageGPTForCausalImageModeling(CONFIG).eval()
    theirs.save_pretrained(tmp_path)
    if pickled:
        tensors = {rename(name): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    else:
        renamed(tmp_path, rename)
    tokens = random_tokens(TINY, 2)
    with torch.no_grad():
        want = theirs(torch.cat([torch.full((2, 1), 9), tokens[:, :-1]], 1)).logits
    assert (load(tmp_path).logits(tokens) - want).abs().max() < 1e-4


def test_names_that_are_there_twice_or_of_two_models_are_refused(tmp_path):
    ImageGPTForCausalImageModeling(CONFIG).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = {"module.lm_head.weight": tensors["lm_head.weight"].clone()}
    save_file({**tensors, **head}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 'lm_head\.weight' twice"):
        load(tmp_path)
    both = {f"{who}.{name}": tensor.clone() for who in ("student", "teacher") for name, tensor in tensors.items()}
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"several models, named student\., teacher\."):
        load(tmp_path)


@pytest.mark.parametrize("backend", [*CACHED, "reference"])
@pytest.mark.parametrize("cls", [ImageGPTModel, ImageGPTForImageClassification])
def test_a_model_without_a_head_has_features(tmp_path, cls, backend):
    torch.manual_seed(0)
    theirs = cls(CONFIG).eval()
    theirs.save_pretrained(tmp_path / "m")
    trunk = theirs if cls is ImageGPTModel else theirs.transformer
    tokens = random_tokens(TINY, 2)
    with torch.no_grad():
        ids = torch.cat([torch.full((2, 1), 9), tokens[:, :-1]], 1)
        want = trunk(ids).last_hidden_state  # after ln_f
    ours = load(tmp_path / "m", backend)
    assert (ours.features(tokens, layer=2, pool=None) - want).abs().max() < 1e-4
    ours.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", backend)
    assert again.architecture == cls.__name__ and torch.equal(again.features(tokens), ours.features(tokens))
    opened = ImageGPTModel.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert (opened(ids).last_hidden_state - want).abs().max() < 1e-5


def test_drawing_without_a_head_is_refused_in_a_sentence(tmp_path):
    ImageGPTForImageClassification(CONFIG).save_pretrained(tmp_path)
    headless = load(tmp_path)
    tokens = random_tokens(TINY, 1)
    whole = ImageGPT(TINY, random_weights(TINY), backend="portable")
    for call in (
        lambda: headless.sample(1, output_type="tokens"),
        lambda: headless.fill(tokens),
        lambda: headless.stream(1),
        lambda: headless.logits(tokens),
        lambda: headless.nll(tokens),
        lambda: headless.generate(torch.tensor([[9]])),
        lambda: whole.sample(1, output_type="tokens", draft=headless),
    ):
        with pytest.raises(CheckpointError, match="is an ImageGPTForImageClassification without a head for colours"):
            call()


def test_a_head_that_the_architecture_promises_must_be_there(tmp_path):
    ImageGPTForCausalImageModeling(CONFIG).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": None}))
    with pytest.raises(CheckpointError, match="is a model of no named architecture without a head"):
        load(tmp_path).sample(1, output_type="tokens")


@pytest.mark.parametrize(("positions", "side"), [(65, 8), (17, 4), (258, 16), (259, 16)])
@pytest.mark.parametrize("spelt", [False, True])
def test_positions_behind_the_canvas_are_no_pixels(tmp_path, positions, side, spelt):
    torch.manual_seed(0)
    theirs = ImageGPTForCausalImageModeling(config_of(positions)).eval()
    theirs.save_pretrained(tmp_path)
    if spelt:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"fastigpt": {"height": side, "width": side}}))
        ours = load(tmp_path)
    else:
        with pytest.warns(UserWarning, match=f"n_positions is {positions}: the canvas is taken to be {side} × {side}"):
            ours = ImageGPT.from_pretrained(tmp_path, backend="cpu", dtype="float32")
    assert (ours.config.height, ours.config.width) == (side, side)
    tokens = torch.randint(0, 9, (1, side * side))
    with torch.no_grad():
        want = theirs(torch.cat([torch.full((1, 1), 9), tokens[:, :-1]], 1)).logits
    assert (ours.logits(tokens) - want).abs().max() < 1e-4
    assert ours.sample(1, output_type="tokens").shape == (1, side * side)


def test_a_position_embedding_of_another_length_than_promised(tmp_path):
    ImageGPTForCausalImageModeling(CONFIG).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for n_positions in (17, 25, 10**6):
        changed = config | {"n_positions": n_positions, "fastigpt": {"height": 4, "width": 4}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=r"wpe\.weight has the shape \[16, 16\], .*n_positions"):
            load(tmp_path)
