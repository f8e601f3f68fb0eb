"""A model of captions and 128 × 128 scenes in two stages: what they write, how they go on, what they refuse."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastigpt
from fastigpt import CheckpointError
from fastigpt.bundled import BUNDLED
from fastigpt.checkpoint import read
from fastigpt.codecs.vq import VQCodec
from fastigpt.codecs.vq_networks import CODEBOOK, VQConfig
from fastigpt.training.captioned import train_stage
from fastigpt.training.janus_network import TrainableJanus
from fastigpt.training.stages import StageSettings
from fastigpt.training.tokenizer import TokenizerStage, pictures, weights_file
from fastigpt.training.transformer import TransformerStage
from fastigpt.training.vq_network import Codebook, TrainableVQ, _detail, reconstruction_loss

VQ = VQConfig(base=32, multipliers=(1, 1, 1, 1), res_blocks=1, latent=16, n_codes=20, code_dim=8)
SIZES = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "head_dim": 8, "width": 16, "n_inner": 24}
SETTINGS = StageSettings(steps=6, batch_size=2, learning_rate=1e-3, seed=3)


def short(patch):
    for name, value in (("tokenizer.UNQUANTISED", 2), ("tokenizer._HELD_OUT", 2), ("transformer._HELD_OUT", 3),
                        ("transformer._ROUND", 3)):  # fmt: skip
        patch.setattr(f"fastigpt.training.{name}", value)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    short(monkeypatch)


def tokenizer_stage(folder, settings=SETTINGS):
    return TokenizerStage(folder, settings, VQ, side=32)


def transformer_stage(folder, settings=SETTINGS, n_scenes=5):
    return TransformerStage(folder, settings, n_scenes=n_scenes, sizes=SIZES, side=32)


def run(stage, save_seconds=1e9):
    stage.resume()
    stage.loop(save_seconds=save_seconds, log_every=2)
    return stage


def interrupted(make, folder, after):
    """A stage that dies after so many steps, having saved the last."""
    stage = make(folder)
    whole = stage.gradients

    def gradients():
        if stage.step == after:
            raise KeyboardInterrupt
        return whole()

    stage.gradients = gradients
    with pytest.raises(KeyboardInterrupt):
        run(stage, save_seconds=1e-9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder after both stages."""
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        short(patch)
        run(tokenizer_stage(folder))
        run(transformer_stage(folder))
    return folder


# --- the schedule ----------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    shares = [StageSettings(1000, 1, 1.0, 0).share(step) for step in range(1000)]
    assert shares[0] == 0.01 and shares[99] == shares[400] == shares[700] == 1
    assert shares[850] == 0.5 and 0 < shares[999] < 0.01


# --- the networks ----------------------------------------------------------------------------------------------------


def test_the_trained_vq_is_the_codec():
    network, images = TrainableVQ(VQ, seed=1).eval(), pictures(0, 0, 3, 32)
    codec = VQCodec(VQ, network.tensors(), 4, 4)
    codes = network.codes(images)
    levels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert torch.equal(codec.encode(levels), codes)
    shown = ((network.shown(codes, 4, 4) + 1) * 127.5).detach().permute(0, 2, 3, 1).numpy()
    assert np.abs(codec.decode(codes) - shown).max() <= 1.01  # one is cut to integers
    other = TrainableVQ(VQ, seed=2).eval()
    other.take(network.tensors())
    assert torch.equal(other.codes(images), codes)


def test_a_step_lowers_the_loss_and_reaches_every_parameter():
    network, images = TrainableVQ(VQ, seed=1), pictures(0, 0, 2, 32)
    loss, rows = network.loss(images)
    assert rows.shape == (32, 8)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(32))
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(network.parameters(), gradients):
            assert gradient.shape == parameter.shape and (gradient != 0).any()
            parameter -= 1e-3 * gradient
    assert network.loss(images)[0] < loss


def test_an_error_beside_detail_costs_more():
    images = torch.full((2, 3, 32, 32), 0.1)
    images[:, :, 4:12, 4:12] = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert reconstruction_loss(images, images) == 0

    def cost(row, column):
        shown = images.clone()
        shown[:, :, row : row + 4, column : column + 4] += 0.2
        return float(reconstruction_loss(shown, images))

    assert cost(6, 6) > 3 * cost(22, 22) > 0
    torch.testing.assert_close(_detail(images).mean((1, 2, 3)), torch.ones(2))


def test_a_transformer_starts_from_the_weights_of_another_with_the_same_vq(trained, tmp_path):
    folder = tmp_path / "second"
    shutil.copytree(trained, folder)
    (folder / "training" / "transformer.pt").unlink()
    begun = read(trained)
    stage = transformer_stage(folder, replace(SETTINGS, seed=4))
    stage.begin_from("first", begun)
    assert all(torch.equal(x, begun.weights[name].float()) for name, x in stage.network.tensors().items())
    run(stage)
    again = transformer_stage(folder, replace(SETTINGS, seed=4))
    with pytest.raises(ValueError, match="init: 'first' there, None here"):
        again.resume()
    again.begin_from("first", begun)
    again.resume()
    assert again.step == SETTINGS.steps
    vq = load_file(weights_file(folder))
    vq[CODEBOOK] = -vq[CODEBOOK]
    save_file(vq, weights_file(folder))
    with pytest.raises(ValueError, match="another VQ"):
        transformer_stage(folder).begin_from("first", begun)
    with pytest.raises(ValueError, match="no model of captions"):
        transformer_stage(trained).begin_from("first", replace(begun, config=replace(begun.config, n_layer=2)))


def test_only_the_transformer_starts_from_weights(trained, tmp_path):
    with pytest.raises(ValueError, match="only the transformer"):
        train_stage("tokenizer", tmp_path, init=trained)
    with pytest.raises(ValueError, match="no model of captions and scenes"):
        train_stage("transformer", trained, init=BUNDLED)


@pytest.mark.slow
def test_compiled_steps_are_those_of_the_plain_ones_but_for_rounding(trained):
    plain, compiled = (
        TransformerStage(trained, SETTINGS, n_scenes=5, sizes=SIZES, side=32, compile=compile)
        for compile in (False, True)
    )
    for stage in (plain, compiled):
        stage.prepare()
        stage.gradients()
    for expected, found in zip(plain.network.parameters(), compiled.network.parameters()):
        assert expected.grad is not None and found.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, rtol=0.05, atol=0.02 * float(expected.grad.abs().max()))


def test_the_codebook_follows_and_revives_what_is_dead():
    codebook = Codebook(torch.eye(4))
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0.2, 0, 0], [1.0, 0.1, 0, 0], [0, 1.0, 0.3, 0]]), dim=1)
    for _ in range(600):
        codebook.follow(rows)
    assert len(codebook.nearest(rows).unique()) == 3  # entries 2 and 3 were never nearest, and took a row
    torch.testing.assert_close(codebook.entries.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(codebook.entries[codebook.nearest(rows)], rows, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_the_trained_transformer_is_the_model(trained, n_kv_head):
    stage = TransformerStage(trained, SETTINGS, sizes=SIZES | {"n_kv_head": n_kv_head}, side=32)
    network, reader = TrainableJanus(stage.config, seed=4).eval(), stage.reader
    from fastigpt.families.janus import Janus
    from fastigpt.model import Model

    model = Model(Janus(stage.config, network.tensors(), stage.vq, stage.vq_weights, reader), backend="reference")
    tokens = torch.randint(0, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "a small blue car left of an orange tree on grass by day"]
    loss = network.loss([reader.prefix(text) for text in prompts], tokens)
    assert loss.item() == pytest.approx(float(model.nll(tokens, prompt=prompts).mean()), abs=1e-5)


# --- the stages ------------------------------------------------------------------------------------------------------


def test_both_stages_end_in_a_checkpoint_that_draws(trained):
    model = fastigpt.load(trained, backend="portable", dtype="float32")
    images = model.sample(2, prompt=["a red house on snow at night", "A cat, on sand!"], seed=0, output_type="np")
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8
    with pytest.raises(ValueError, match=r"unknown word 'elephant'"):
        model.sample(1, prompt="an elephant on snow")
    with pytest.raises(ValueError, match="at most 20"):
        model.sample(1, prompt="a " * 17)
    told = json.loads((trained / "generation_config.json").read_text())
    assert told["top_k"] == 0 and told["generation_kwargs"]["boi_token_id"] == 2


def test_transformers_opens_it_whole(trained):
    from transformers import JanusForConditionalGeneration

    theirs, told = JanusForConditionalGeneration.from_pretrained(trained, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    model = fastigpt.load(trained, backend="portable", dtype="float32")
    prefix = torch.tensor([model.reader.prefix("a red house")])
    drawn = (
        theirs.float()
        .eval()
        .generate(
            prefix, attention_mask=torch.ones_like(prefix), generation_mode="image", do_sample=False, guidance_scale=3.0
        )
    )
    assert torch.equal(
        model.sample(1, prompt="a red house", guidance_scale=3.0, temperature=0, output_type="tokens"), drawn
    )


@pytest.mark.parametrize("make", [tokenizer_stage, transformer_stage])
def test_a_killed_stage_ends_with_the_same_weights(tmp_path, trained, make):
    if make is transformer_stage:
        weights_file(tmp_path).parent.mkdir()
        weights_file(tmp_path).write_bytes(weights_file(trained).read_bytes())
    interrupted(make, tmp_path, 3)
    stage = run(make(tmp_path))
    assert stage.step == 6 and [row["step"] for row in stage.log] == [2, 4, 6]
    whole = make(trained)
    whole.resume()
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, stage.network.state_dict()[name]), name


def test_another_number_of_steps_is_fine_until_the_rate_falls(tmp_path):
    interrupted(tokenizer_stage, tmp_path, 3)  # lowered from step 4 on
    stage = tokenizer_stage(tmp_path, StageSettings(30, 2, 1e-3, 3))
    stage.resume()
    assert stage.step == 3
    with pytest.raises(ValueError, match=r"other settings \(learning_rate: 0.001 there, 0.002 here\)"):
        tokenizer_stage(tmp_path, StageSettings(6, 2, 2e-3, 3)).resume()
    run(tokenizer_stage(tmp_path))
    with pytest.raises(ValueError, match=r"other settings \(steps: 6 there, 30 here\)"):
        tokenizer_stage(tmp_path, StageSettings(30, 2, 1e-3, 3)).resume()


def test_scenes_are_encoded_once(tmp_path, trained, monkeypatch):
    weights_file(tmp_path).parent.mkdir()
    weights_file(tmp_path).write_bytes(weights_file(trained).read_bytes())
    calls, encode = [], TransformerStage._encode

    def counted(self, seed, first, n):
        calls.append((seed, first, n))
        return encode(self, seed, first, n)

    monkeypatch.setattr(TransformerStage, "_encode", counted)
    first = run(transformer_stage(tmp_path, n_scenes=4)).codes
    assert [call for call in calls if call[0] == SETTINGS.seed] == [(3, 0, 3), (3, 3, 1)]
    monkeypatch.setattr(TransformerStage, "_encode", lambda self, seed, first, n: torch.full((n, 16), first))
    more = transformer_stage(tmp_path, n_scenes=6)
    more.prepare()
    assert torch.equal(more.codes[:4], first) and (more.codes[4:] == 4).all()
    other = load_file(weights_file(tmp_path))
    other[CODEBOOK] = other[CODEBOOK].flip(0)
    save_file(other, weights_file(tmp_path))
    anew = transformer_stage(tmp_path, n_scenes=2)
    anew.prepare()
    assert (anew.codes == 0).all()  # by another VQ


def test_a_transformer_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="train the tokenizer first"):
        train_stage("transformer", tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value"),
    [("stage", "vae"), ("stage", None), ("out", 3), ("steps", 0), ("steps", 1.5), ("batch_size", True),
     ("learning_rate", 0), ("learning_rate", "x"), ("n_scenes", 5), ("seed", -1), ("save_seconds", 0),
     ("log_every", 0)],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(tmp_path, name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        train_stage(**{"stage": "tokenizer", "out": tmp_path / "run", name: value})
    assert not (tmp_path / "run").exists()
