"""LlamaGen is held to the figures of its own code; its files are read as they were published."""

from __future__ import annotations

import argparse
import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fastigpt
from fastigpt import CheckpointError
from fastigpt.cli import main
from fastigpt.families import llamagen
from fastigpt.families.llamagen import LlamaGen, read_file
from fastigpt.jobs.drawing import model_sha256
from fastigpt.model import Model

GOLDEN = Path(__file__).parent / "llamagen_golden"
FILE = GOLDEN / "c2i_tiny_64.pt"


@pytest.fixture(scope="module")
def figures() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "c2i_tiny_64.npz").items()}


@pytest.fixture(scope="module")
def pretrained() -> LlamaGen:
    return read_file(FILE, n_head=4)


@pytest.fixture(params=["reference", "portable"])
def model(request: pytest.FixtureRequest, pretrained: LlamaGen) -> Model:
    return Model(pretrained, device="cpu", backend=request.param, dtype="float32")


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tiny size were one that was published."""
    monkeypatch.setitem(llamagen._HEADS, (3, 64), 4)


def weights() -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(FILE, weights_only=True)["model"]


# --- the same numbers --------------------------------------------------------------------------------------------


def test_logits_equal_those_of_its_own_code(model, figures):
    tokens, labels = figures["greedy_cfg_4.0"].long(), figures["labels"].long()
    for name, prefix in (("conditional", labels[:, None]), ("unconditional", torch.full((3, 1), 10))):
        expected = figures[f"logits_{name}"]
        assert (model.engine.logits(tokens, prefix) - expected).abs().max() <= 1e-4 and expected.std() > 0.3
    assert (model.logits(tokens) - figures["logits_unconditional"]).abs().max() <= 1e-4


@pytest.mark.parametrize("scale", ["1.5", "4.0"])
@pytest.mark.parametrize("window", [1, 8])
def test_greedy_tokens_with_guidance_equal_those_of_its_own_code(model, figures, scale, window):
    found = model.sample(
        3, label=figures["labels"], guidance_scale=float(scale), temperature=0, window=window, output_type="tokens",
    )  # fmt: skip
    assert torch.equal(found, figures[f"greedy_cfg_{scale}"].long())


def test_greedy_tokens_without_guidance_do_too(model, figures):
    found = model.sample(3, label=figures["labels"].tolist(), temperature=0, guidance_scale=1, output_type="tokens")
    assert torch.equal(found, figures["greedy_cfg_1.0"].long())


def test_the_rotary_table_of_384_pixels_has_a_row_for_each_input():
    config = llamagen.LlamaGenConfig(24, 32, 32, 3200, 8704, 16384, 1000, 24, 24)
    table = llamagen.rotary_table(config)
    assert table.shape == (576, 50, 2) and bool((table[0] == 0).all())
    assert torch.allclose(table[1 + 24 * 3 + 5, 0], torch.tensor([np.cos(3), np.sin(3)]).float())
    assert torch.allclose(table[1 + 24 * 3 + 5, 25], torch.tensor([np.cos(5), np.sin(5)]).float())


@pytest.mark.parametrize("n_layer, width, n_head", [(*size, heads) for size, heads in llamagen._HEADS.items()])
def test_published_sizes_have_the_published_shapes(n_layer, width, n_head):
    inner = {768: 2048, 1024: 2816, 1280: 3584, 1536: 4096, 3200: 8704}[width]
    config = llamagen.LlamaGenConfig(n_layer, n_head, n_head, width, inner, 16384, 1000, 24, 24)
    assert llamagen._config_of(config.tensor_shapes(), None, 24, "it") == config
    assert LlamaGen(config, {}).spec.block.head_dim == (100 if width == 3200 else 64)


# --- drawing -----------------------------------------------------------------------------------------------------


def test_images_of_classes_are_drawn_from_a_published_file(published, tmp_path):
    model = fastigpt.load(FILE, device="cpu")
    assert model.backend == "cpu" and model.image_size == (64, 64)
    how = {"guidance_scale": 4.0, "top_k": 200, "seed": 1}
    images = model.sample(2, label=7, **how)
    assert [image.size for image in images] == [(64, 64)] * 2
    tokens = model.sample(2, label=[3, 7], output_type="tokens", **how)
    assert torch.equal(tokens[1], model.sample(2, label=7, output_type="tokens", **how)[1])
    assert torch.equal(tokens[:1], model.sample(1, prompt="3", output_type="tokens", **how))
    assert np.array_equal(np.asarray(images[1]), model.decode(tokens[1:])[0])
    kept = model.complete(images[0], rows=4, label=7, output_type="tokens", **how)
    assert torch.equal(kept[:, :32], model.encode(images[0])[:, :32])


def test_what_is_saved_draws_the_same(pretrained, tmp_path):
    model = Model(pretrained, device="cpu", backend="portable")
    model.save_pretrained(tmp_path)
    names = {"config.json", "generation_config.json", "model.safetensors", "vq.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names
    again = fastigpt.load(tmp_path, device="cpu", dtype="float32")
    assert again.config == model.config and again.codec == model.codec
    options = {"label": 1, "guidance_scale": 2.0, "seed": 3, "output_type": "np"}
    assert np.array_equal(model.sample(1, **options), again.sample(1, **options))


def test_convert_writes_such_a_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fastigpt", "convert", str(FILE), "--n-head", "4", "--out", str(tmp_path / "x")])
    with suppress(SystemExit):
        main()
    assert fastigpt.load(tmp_path / "x", device="cpu").config.n_head == 4


@pytest.mark.parametrize("wrap", ["model", "module", "state_dict", None])
def test_all_layouts_of_files_are_read(published, tmp_path, wrap):
    held = {f"_orig_mod.{name}": tensor for name, tensor in weights().items()}
    whole = held if wrap is None else {wrap: held, "steps": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(whole, tmp_path / "c2i_T_128.pt")
    model = fastigpt.load(tmp_path / "c2i_T_128.pt", device="cpu")
    assert model.spec.height == 8 and model.codec is None
    assert model.sample(1, label=0, output_type="tokens").shape == (1, 64)
    with pytest.raises(ValueError, match="has no VQ"):
        model.sample(1, label=0)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"label": 10}, ValueError, "label must be the number of a class, 0 to 9, not '10'"),
        ({"label": -1}, ValueError, "label must be the number of a class"),
        ({"label": 1.5}, TypeError, "label must be an int"),
        ({"label": True}, TypeError, "label must be an int"),
        ({"label": "cat"}, ValueError, "label must be the number of a class, 0 to 9, not 'cat'"),
        ({"label": [1, 2, 3]}, ValueError, "label has 3 entries for 2 images"),
        ({"label": 1, "prompt": "2"}, ValueError, "give prompt or label, not both"),
        ({"prompt": "a cat"}, ValueError, "prompt must be the number of a class, 0 to 9, not 'a cat'"),
        ({"guidance_scale": 2.0}, ValueError, "without a prompt to follow"),
    ],
)
def test_labels_that_are_no_classes_are_refused(pretrained, options, error, told):
    model = Model(pretrained, device="cpu", backend="portable")
    with pytest.raises(error, match=told):
        model.fill(torch.full((2, 64), -1), **options)


def test_a_model_without_classes_refuses_labels():
    with pytest.raises(ValueError, match="label was given, but this model knows no classes"):
        fastigpt.sample(1, label=3)


def write(folder: Path, held: object, name: str = "c2i_T_64.pt") -> Path:
    torch.save(held, folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["c2i_B_384.pt", "./x/c2i_B_384.pt"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(CheckpointError, match=f"no file '{name}'"):
        fastigpt.load(name)


def test_a_job_knows_a_model_by_all_that_it_draws_with(pretrained):
    assert pretrained.vq_weights is not None
    other = {**pretrained.vq_weights, "decoder.conv_out.bias": pretrained.vq_weights["decoder.conv_out.bias"] + 1}
    changed = [pretrained, replace(pretrained, vq_weights=other), replace(pretrained, vq=None, vq_weights=None)]
    assert len({model_sha256(Model(each, device="cpu", backend="portable")) for each in changed}) == 3


def test_a_size_that_was_not_published_is_refused_with_what_to_do():
    with pytest.raises(CheckpointError, match=r"3 layers of width 64.*--n-head"):
        fastigpt.load(FILE)


def test_text_to_image_is_refused_with_what_is_missing(tmp_path):
    file = write(tmp_path, {"cls_embedding.uncond_embedding": torch.zeros(120, 8)}, "t2i_XL_stage1_256.pt")
    with pytest.raises(CheckpointError, match="Flan-T5-XL"):
        fastigpt.load(file)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda held: held.pop("norm.weight"), "lacks norm.weight"),
        (lambda held: held.pop("tok_embeddings.weight"), "is no LlamaGen"),
        (lambda held: held.pop("layers.0.attention.wqkv.weight"), "is no LlamaGen of classes|no published size"),
        (lambda held: held.update({"output.weight": torch.zeros(3, 64)}), r"output.weight has the shape \[3, 64\]"),
        (lambda held: held.update({"norm.weight": torch.zeros(64, dtype=torch.int64)}), "holds torch.int64"),
        (lambda held: held.update({"norm.weight": torch.full((64,), float("nan"))}), "not finite"),
        (lambda held: held.update({"tok_embeddings.weight": torch.zeros(3)}), "missing or odd"),
        (lambda held: held.update({"x": 3}), "dictionary from names to tensors"),
    ],
)
def test_damaged_files_are_refused(published, tmp_path, change, told):
    held = weights()
    change(held)
    with pytest.raises(CheckpointError, match=told):
        fastigpt.load(write(tmp_path, held))


def test_a_vq_of_another_codebook_is_refused(published, tmp_path):
    held = torch.load(GOLDEN / "vq_tiny_ds8.pt", weights_only=True)
    held["model"]["quantize.embedding.weight"] = torch.zeros(9, 8)
    write(tmp_path, held, "vq_x.pt")
    with pytest.raises(CheckpointError, match="has 9 codes, the transformer draws 256"):
        fastigpt.load(write(tmp_path, weights()))
    write(tmp_path, {"model": {"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3)}}, "vq_x.pt")
    with pytest.raises(CheckpointError, match="holds no VQ that is known"):
        fastigpt.load(tmp_path / "c2i_T_64.pt")
    write(tmp_path, {}, "vq_y.pt")
    with pytest.raises(CheckpointError, match="several VQs"):
        fastigpt.load(tmp_path / "c2i_T_64.pt")


@pytest.mark.parametrize(("name", "told"), [("c2i.pt", "does not tell the size"), ("c2i_T_65.pt", "no multiple")])
def test_a_name_that_does_not_tell_the_size_is_refused(published, tmp_path, name, told):
    shutil.copy(GOLDEN / "vq_tiny_ds8.pt", tmp_path)
    with pytest.raises(CheckpointError, match=told):
        fastigpt.load(write(tmp_path, weights(), name))


class Hostile:
    def __reduce__(self):
        return (print, ("ran",))


def test_a_pickle_that_would_run_something_is_refused(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        fastigpt.load(write(tmp_path, {"model": weights(), "args": Hostile()}))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_layer": 2**20}, "n_layer must be"),
        ({"n_layer": "3"}, "n_layer must be an int"),
        ({"width": 66}, "do not fit"),
        ({"height": 0}, "height must be"),
        ({"rotary_base": float("inf")}, "rotary_base must be"),
        ({"norm_epsilon": None}, "norm_epsilon must be"),
        ({"height": 2**20, "columns": 2**20}, "too large"),
        ({"n_codes": 255}, "has the shape"),
    ],
)
def test_impossible_configurations_are_refused(pretrained, tmp_path, change, told):
    pretrained.write(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=told):
        fastigpt.load(tmp_path)
    del data["n_head"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError):
        fastigpt.load(tmp_path)
