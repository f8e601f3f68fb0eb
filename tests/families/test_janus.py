"""Janus is held to transformers' JanusForConditionalGeneration on tiny random weights."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_janus import CODES, IMAGE_ID, PAD_ID, SIDE, START_ID, their_model, tokenizer
from transformers import JanusForConditionalGeneration

import fastigpt
from fastigpt import CheckpointError
from fastigpt.families import janus, janus_names
from fastigpt.families.chat import IMAGE
from fastigpt.jobs.drawing import model_sha256
from fastigpt.model import Model


@pytest.fixture(scope="module")
def theirs() -> JanusForConditionalGeneration:
    return their_model()


@pytest.fixture(scope="module")
def saved(theirs: JanusForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("janus")
    theirs.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(params=["reference", "portable"])
def model(request: pytest.FixtureRequest, saved: Path) -> Model:
    return fastigpt.load(saved, device="cpu", backend=request.param, dtype="float32")


def copied(saved: Path, folder: Path, **changes: object) -> Path:
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    data = json.loads((folder / "config.json").read_text())
    data.update(changes)
    (folder / "config.json").write_text(json.dumps(data))
    return folder


# --- the same numbers --------------------------------------------------------------------------------------------


def their_logits(theirs: JanusForConditionalGeneration, prefix: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    words = theirs.get_input_embeddings()(prefix)
    inputs = torch.cat([words, theirs.prepare_embeddings_for_image_generation(tokens[:, :-1])], 1)
    hidden = theirs.model.language_model(inputs_embeds=inputs).last_hidden_state
    return theirs.model.generation_head(hidden[:, prefix.shape[1] - 1 :])


def test_logits_equal_transformers(model, theirs):
    tokens = torch.randint(0, CODES, (2, SIDE * SIDE), generator=torch.Generator().manual_seed(2))
    for text in ("a red house", "a blue tree on snow"):
        prefix = torch.tensor([model.reader.prefix(text)] * 2)
        with torch.inference_mode():
            expected = their_logits(theirs, prefix, tokens)
        assert (model.logits(tokens, prompt=text) - expected).abs().max() <= 1e-4 and expected.std() > 0.3


@pytest.mark.parametrize("window", [1, 4])
def test_greedy_tokens_with_guidance_equal_transformers(model, theirs, window):
    drawn = set()
    for text in ("a red house", "a blue tree on snow", "snow"):
        ids = torch.tensor([model.reader.prefix(text)])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), generation_mode="image", guidance_scale=5.0, do_sample=False
        )
        found = model.sample(
            1, prompt=text, guidance_scale=5.0, temperature=0, window=window, output_type="tokens"
        )  # fmt: skip
        assert torch.equal(found, expected)
        drawn |= set(found.flatten().tolist())
    assert len(drawn) > 8  # else it would say little


def test_images_equal_transformers(model, theirs):
    tokens = torch.randint(0, CODES, (2, SIDE * SIDE), generator=torch.Generator().manual_seed(3))
    entries = torch.nn.functional.normalize(theirs.model.vqmodel.quantize.embedding.weight, dim=-1)
    with torch.inference_mode():
        x = entries[tokens].view(2, SIDE, SIDE, -1).permute(0, 3, 1, 2)
        pixels = theirs.model.vqmodel.decoder(theirs.model.vqmodel.post_quant_conv(x))
    levels = ((pixels + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (model.decode(tokens) == levels).mean() > 0.99
    assert (np.abs(model.decode(tokens).astype(int) - levels) <= 1).all() and levels.std() > 5


# --- prompts -----------------------------------------------------------------------------------------------------


def test_guidance_leads_away_from_as_many_pads(model):
    canvases = torch.full((2, SIDE * SIDE), -1)
    for request in model.requests(canvases, prompt=["a red house", "a"], guidance_scale=5.0):
        assert request.negative == (START_ID, *[PAD_ID] * (len(request.prefix) - 2), IMAGE_ID)
        assert request.prefix[0] == START_ID and request.prefix[-1] == IMAGE_ID
    away = model.requests(canvases[:1], prompt="a red house", negative_prompt="tree", guidance_scale=5.0)
    assert away[0].negative == model.reader.prefix("tree")
    (plain,) = model.requests(canvases[:1])
    assert set(plain.prefix[1:-1]) == {PAD_ID}


def test_images_of_prompts_of_many_lengths_are_those_of_each_alone(model):
    prompts = ["a red house", "", "a blue tree on snow"]
    options = {"guidance_scale": 5.0, "seed": 4}
    canvases = torch.full((3, SIDE * SIDE), -1)
    together = model.fill(canvases, prompt=prompts, **options)
    for i, prompt in enumerate(prompts):
        alone = model.sample(1, prompt=prompt, first_index=i, output_type="tokens", **options)
        assert torch.equal(together[i : i + 1], alone)


def test_photographs_are_completed_by_mask_and_prompt(model):
    image = model.sample(1, prompt="a red house", guidance_scale=5.0, seed=1)[0]
    mask = np.zeros((16, 16), bool)
    mask[:8, :8] = True
    found = model.complete(image, mask=mask, prompt="a blue tree", guidance_scale=5.0, seed=2, output_type="tokens")
    kept = torch.ones(SIDE, SIDE, dtype=torch.bool)
    kept[:2, :2] = False
    assert torch.equal(found[0, kept.flatten()], model.encode(image)[0, kept.flatten()])


def test_a_prompt_that_is_too_long_is_refused(model):
    longest = model.spec.prefix_length
    assert longest == 256 - SIDE * SIDE + 1
    with pytest.raises(ValueError, match=f"prompt has [0-9]+ tokens .* the model reads at most {longest}"):
        model.sample(1, prompt="red " * longest)
    with pytest.raises(ValueError, match="prompt is no text"):
        model.sample(1, prompt="a \ud800")


# --- files -------------------------------------------------------------------------------------------------------


def test_auto_takes_the_fastest_engine(saved):
    assert fastigpt.load(saved, device="cpu").backend == "cpu"


def test_what_is_saved_or_pickled_draws_the_same(saved, tmp_path):
    model = fastigpt.load(saved, device="cpu")
    model.save_pretrained(tmp_path)
    options = {"prompt": "a red house", "guidance_scale": 5.0, "seed": 1, "output_type": "np"}
    expected = model.sample(1, **options)
    for again in (fastigpt.load(tmp_path, device="cpu"), pickle.loads(pickle.dumps(model))):
        assert again.config == model.config and again.codec == model.codec
        assert np.array_equal(again.sample(1, **options), expected)


def test_a_job_knows_a_model_by_its_tokenizer(saved):
    model = fastigpt.load(saved, device="cpu")
    text = model.reader.tokenizer.replace("blue", "bleu")
    other = Model(replace(model.pretrained, reader=replace(model.reader, tokenizer=text)), device="cpu")
    assert model_sha256(model) != model_sha256(other)


def deepseek_name(name: str) -> str:
    """As DeepSeek's checkpoint has it."""
    name = name.removeprefix("model.")
    for theirs, ours in janus_names._DEEPSEEK.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    if name.startswith("gen_vision_model."):
        name = "gen_vision_model." + janus_names.vq_name(name.removeprefix("gen_vision_model."))
    return "language_model.lm_head.weight" if name == "lm_head.weight" else name


@pytest.mark.parametrize("shards", [1, 2])
def test_deepseeks_layout_gives_the_same_model(saved, tmp_path, monkeypatch, shards):
    monkeypatch.setattr(janus, "DEEPSEEK_PIXELS", SIDE * 4)
    held = {deepseek_name(name): tensor for name, tensor in load_file(saved / "model.safetensors").items()}
    assert {"gen_head.vision_head.bias", "gen_vision_model.decoder.mid.1.q.weight", "gen_aligner.layers.2.bias",
            "language_model.model.layers.1.mlp.up_proj.weight"} <= held.keys()  # fmt: skip
    held["gen_vision_model.quantize.codebook_used"] = torch.zeros(7, dtype=torch.int64)
    if shards == 1:
        torch.save(held, tmp_path / "pytorch_model.bin")
    else:
        names = sorted(held)
        where = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(where.values()):
            torch.save({name: held[name] for name in names if where[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    text = json.loads((saved / "config.json").read_text())["text_config"]
    language = {key: text[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                           "num_attention_heads", "num_key_value_heads",
                                           "max_position_embeddings")}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "multi_modality", "language_config": {"model_type": "llama", **language},
        "gen_head_config": {"params": {"image_token_size": CODES, "n_embed": 64, "image_token_embed": 64}},
        "gen_aligner_config": {"params": {"depth": 2, "input_dim": 8, "n_embed": 64}},
        "gen_vision_config": {"params": {"image_token_size": CODES, "n_embed": 8}},
    }))  # fmt: skip
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    model, other = (fastigpt.load(folder, device="cpu") for folder in (tmp_path, saved))
    assert model.config == other.config
    options = {"prompt": "a red house", "guidance_scale": 5.0, "seed": 1, "output_type": "np"}
    assert np.array_equal(model.sample(1, **options), other.sample(1, **options))


@pytest.mark.parametrize("size", ["1B", "7B"])
def test_published_shapes_are_those_that_are_read(size):
    width, layers, inner, heads = {"1B": (2048, 24, 5632, 16), "7B": (4096, 30, 11008, 32)}[size]
    config = janus.JanusConfig(layers, heads, heads, 128, width, inner, 102400, 16384, 8, 24, 24)
    shapes = config.tensor_shapes()
    assert len(shapes) == 9 * layers + 11
    count = sum(np.prod(shape) for name, shape in shapes.items() if name.startswith("language_model."))
    assert round(count / 1e6, 1) == {"1B": 1442.9, "7B": 6490.9}[size]


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_janus_that_reads_images_only_is_refused(saved, tmp_path):
    folder = copied(saved, tmp_path)
    held = {k: v for k, v in load_file(saved / "model.safetensors").items() if "generation_head" not in k}
    save_file(held, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no head for images"):
        fastigpt.load(folder)


def test_a_vq_of_another_codebook_is_refused(saved, tmp_path):
    folder = copied(saved, tmp_path)
    held = load_file(saved / "model.safetensors")
    held["model.vqmodel.quantize.embedding.weight"] = torch.zeros(9, 8)
    save_file(held, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="the VQ has 9 codes, the language model draws 40"):
        fastigpt.load(folder)


def test_a_missing_or_strange_tokenizer_is_refused(saved, tmp_path):
    folder = copied(saved, tmp_path)
    for content, told in (
        (None, r"tokenizer.json is missing"),
        ("{}", "is no tokenizer"),
        (tokenizer().to_str().replace(IMAGE, "<other>"), f"does not know {IMAGE}"),
    ):
        (folder / "tokenizer.json").unlink()
        if content is not None:
            (folder / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=re.escape(told)):
            fastigpt.load(folder)
        (folder / "tokenizer.json").touch()


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("text_config", {"num_hidden_layers": 2**20}, "num_hidden_layers must be"),
        ("text_config", {"num_hidden_layers": 3}, "lacks language_model.layers.2"),
        ("text_config", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("text_config", {"num_key_value_heads": 3}, "do not fit"),
        ("text_config", {"rope_parameters": {"rope_type": "yarn"}}, "rotary positions are"),
        ("text_config", {"vocab_size": 16}, "tokenizer.json has ids up to|has the shape"),
        ("text_config", {"max_position_embeddings": 20}, "has no room for a prompt"),
        ("vq_config", {"num_embeddings": 41}, "the VQ has 40 codes, the language model draws 41"),
        ("vq_config", {"num_patches": 2**20}, "is too large"),
        ("vq_config", {"embed_dim": "8"}, "embed_dim must be an int"),
    ],
)
def test_impossible_configurations_are_refused(saved, tmp_path, part, change, told):
    held = json.loads((saved / "config.json").read_text())[part]
    folder = copied(saved, tmp_path, **{part: {**held, **change}})
    with pytest.raises(CheckpointError, match=told):
        fastigpt.load(folder)


def test_a_part_that_is_missing_is_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match="vq_config must be an object"):
        fastigpt.load(copied(saved, tmp_path, vq_config=None))


# --- Janus-1.3B --------------------------------------------------------------------------------------------------


def words_of(reader) -> list[str]:
    names = {number: word for word, number in tokenizer().get_vocab().items()}
    return [names[number] for number in reader.prefix("a red house")]


@pytest.mark.parametrize("how", ["name", "hub", "file"])
def test_the_forerunner_is_told_by_its_name_and_has_its_own_words(saved, tmp_path, how):
    parts = {"name": "Janus-1.3B", "hub": "models--deepseek-ai--Janus-1.3B/snapshots/1", "file": "JanusFlow-1.3B-like"}
    folder = tmp_path / parts[how]
    folder.mkdir(parents=True)
    copied(saved, folder)
    if how == "file":
        (folder / "processor_config.json").write_text('{"sft_format": "deepseek_old"}')
    pro, old = (fastigpt.load(each, device="cpu") for each in (saved, folder))
    assert pro.reader.format == "deepseek" and old.reader.format == "deepseek_old"
    assert words_of(old.reader)[1:-1] == ["User", ":", "a", "red", "house", "Assistant", ":"]
    assert words_of(pro.reader)[1:3] == ["<unk>", "User"]  # this tokenizer does not know "<|"
    old.save_pretrained(tmp_path / "copy")
    assert fastigpt.load(tmp_path / "copy", device="cpu").reader == old.reader
    assert model_sha256(pro) != model_sha256(old)


@pytest.mark.parametrize("told", ['{"sft_format": "llama"}', "[]", '{"sft_format": 3}'])
def test_words_that_are_not_known_are_refused(saved, tmp_path, told):
    folder = copied(saved, tmp_path)
    (folder / "processor_config.json").write_text(told)
    with pytest.raises(CheckpointError, match=r"processor_config\.json"):
        fastigpt.load(folder)
