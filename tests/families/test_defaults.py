"""Drawing options that a model brings along, its family's or its generation_config.json's; what is said wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPTED, random_weights

import fastigpt
from fastigpt import CheckpointError, ImageGPT, jobs
from fastigpt.families import generation_config, janus, llamagen
from fastigpt.families.llamagen import LlamaGen, LlamaGenConfig
from fastigpt.jobs.directory import JobDirectory
from fastigpt.jobs.store import open_store
from fastigpt.model import Model
from fastigpt.options import checked
from fastigpt.prompts import Vocabulary
from fastigpt.server.parameters import Generation, parsed
from fastigpt.server.served import Served

CONFIG = LlamaGenConfig(1, 2, 2, 16, 24, 12, 10, 2, 3)
EMPTY = torch.full((1, 6), -1)


def tiny(**defaults: Any) -> LlamaGen:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in CONFIG.tensor_shapes().items()}
    return LlamaGen(CONFIG, weights, **({"defaults": defaults} if defaults else {}))


@pytest.fixture
def model() -> Model:
    return Model(tiny(guidance_scale=3.0, top_k=5), device="cpu", backend="portable", dtype="float32")


def drawing(model: Model, **options: Any) -> tuple[Any, ...]:
    (request,) = model.requests(EMPTY, seed=1, **options)
    d = request.drawing
    return d.guidance_scale, d.top_k, d.top_p, d.temperature, request.negative


def test_each_family_draws_as_its_authors_do():
    assert janus.DEFAULTS == {"guidance_scale": 5.0}
    assert tiny().defaults == llamagen.DEFAULTS == {"guidance_scale": 4.0, "top_k": 2000}
    own = ImageGPT(PROMPTED, random_weights(PROMPTED), vocabulary=Vocabulary(("-", "a", "b"), 3), backend="portable")
    assert own.defaults == {} and drawing_of(own, prompt="a") == (None, None, None)
    assert drawing_of(own, prompt="a", guidance_scale=1) == (1.0, None, None)  # as ever


def drawing_of(model: Model, **options: Any) -> tuple[Any, ...]:
    (request,) = model.requests(torch.full((1, model.spec.n_positions), -1), seed=1, **options)
    return request.drawing.guidance_scale, request.drawing.top_k, request.drawing.top_p


def test_what_is_not_said_is_the_models(model):
    assert drawing(model, label=3) == (3.0, 5, None, 1.0, (10,))
    assert drawing(model, prompt="3", guidance_scale=None, top_k=None) == (3.0, 5, None, 1.0, (10,))
    assert drawing(model, negative_prompt="4") == (3.0, 5, None, 1.0, (4,))


def test_what_is_said_wins(model):
    assert drawing(model, label=3, guidance_scale=2, top_k=4, top_p=0.5) == (2.0, 4, 0.5, 1.0, (10,))
    assert drawing(model, label=3, guidance_scale=0)[0] == 0.0
    assert drawing(model, label=3, guidance_scale=1) == (None, 5, None, 1.0, None)
    assert drawing(model, label=3, negative_prompt="4", guidance_scale=1)[4] is None
    assert drawing(model, label=3, top_k=10**9)[1] == 12


def test_without_anything_to_follow_nothing_is_guided(model):
    assert drawing(model) == (None, 5, None, 1.0, None)
    with pytest.raises(ValueError, match="guidance_scale was given without a prompt to follow"):
        drawing(model, guidance_scale=2.0)


def test_a_model_may_have_a_temperature():
    warm = Model(tiny(temperature=0.5), device="cpu", backend="portable", dtype="float32")
    for said, expected in (
        ({}, 0.5),
        ({"temperature": None}, 0.5),
        ({"temperature": 1}, 1.0),
        ({"temperature": 0}, 0.0),
    ):
        assert drawing(warm, **said)[3] == expected
    served: Any = Served("tiny", warm, batch=None)  # type: ignore[arg-type]
    for given, expected in (({}, 0.5), ({"temperature": 1.0}, 1.0)):
        (request,) = served.generation(parsed(Generation, {"prompt": "7", **given}, strings=False)).requests
        assert request.drawing.temperature == expected


def test_guidance_of_1_draws_what_no_guidance_would(model):
    plain = Model(tiny(top_k=5), device="cpu", backend="portable", dtype="float32")
    how = {"label": 3, "seed": 2, "output_type": "tokens"}
    assert torch.equal(model.sample(8, guidance_scale=1, **how), plain.sample(8, **how))
    assert not torch.equal(model.sample(8, **how), plain.sample(8, **how))


def test_options_without_a_model_have_no_defaults(model):
    found = checked({"label": 3, "seed": 0}, 1, model.spec).drawing
    assert (found.guidance_scale, found.top_k) == (None, None)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({}, {"guidance_scale": 4.0, "top_k": 2000}),
        ({"guidance_scale": 2, "do_sample": True}, {"guidance_scale": 2.0, "top_k": 2000}),
        ({"temperature": 3}, {"guidance_scale": 4.0, "temperature": 3.0, "top_k": 2000}),
        ({"top_k": None, "top_p": 0.9}, {"guidance_scale": 4.0, "top_p": 0.9}),
        ({"top_k": 0}, {"guidance_scale": 4.0}),
        ({"guidance_scale": None}, {"top_k": 2000}),
    ],
)
def test_a_checkpoint_may_say_otherwise(tmp_path, told, found):
    tiny().write(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(told))
    model = fastigpt.load(tmp_path, device="cpu")
    assert model.defaults == found
    model.save_pretrained(tmp_path / "again")
    assert fastigpt.load(tmp_path / "again", device="cpu").defaults == found


@pytest.mark.parametrize(
    "told",
    [
        [],
        {"guidance_scale": "5"},
        {"guidance_scale": -1},
        {"top_k": -2},
        {"top_p": 2},
        {"top_k": 1.5},
        {"temperature": -1},
        "{",
    ],
)
def test_a_checkpoint_that_says_what_cannot_be_is_refused(tmp_path, told):
    file = tmp_path / "generation_config.json"
    file.write_text(told if isinstance(told, str) else json.dumps(told))
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        generation_config.read(file, {})


def run(folder: Path, source: Path, **options: Any) -> dict[str, Any]:
    lines = ["3", "7"]
    jobs.run(folder, 4, model=source, prompts=lines, seed=1, shard_size=2, progress=False, **options)
    return json.loads((folder / "job.json").read_text())


def tokens(folder: Path) -> torch.Tensor:
    return torch.cat([torch.from_numpy(t.astype("int64")) for _, t in JobDirectory.open(open_store(folder)).shards()])


def test_a_job_writes_down_what_it_draws_with(tmp_path):
    source = tmp_path / "model"
    tiny(guidance_scale=3.0, top_k=5, temperature=0.5).write(source)
    how: dict[str, Any] = {"backend": "portable", "dtype": "float32", "device": "cpu"}
    told = run(tmp_path / "a", source, **how)
    assert (told["guidance_scale"], told["top_k"], told["top_p"], told["temperature"]) == (3.0, 5, None, 0.5)
    told = run(tmp_path / "b", source, guidance_scale=1, top_k=9, **how)
    assert (told["guidance_scale"], told["top_k"]) == (1.0, 9)
    run(tmp_path / "b", source, guidance_scale=1, top_k=9, **how)  # the same command goes on with it
    model = fastigpt.load(source, **how)
    for folder, options in (("a", {}), ("b", {"guidance_scale": 1, "top_k": 9})):
        expected = model.sample(4, label=[3, 7, 3, 7], seed=1, output_type="tokens", **options)
        assert torch.equal(tokens(tmp_path / folder), expected)


def test_a_job_goes_on_as_it_began_whatever_the_checkpoint_says_by_then(tmp_path):
    source, how = tmp_path / "model", {"backend": "portable", "dtype": "float32", "device": "cpu"}
    for name in ("whole", "cut"):
        tiny(guidance_scale=3.0, top_k=5).write(source)
        (source / "generation_config.json").write_text('{"guidance_scale": null, "top_k": null}')
        told = run(tmp_path / name, source, **how)
        assert (told["guidance_scale"], told["top_k"]) == (None, None)
    (source / "generation_config.json").write_text('{"guidance_scale": 3.0, "top_k": 5}')
    for file in (tmp_path / "cut" / "shards").glob("000001*"):
        file.unlink()
    (tmp_path / "cut" / "manifest.json").unlink()
    jobs.run(tmp_path / "cut", progress=False, device="cpu")
    assert torch.equal(tokens(tmp_path / "cut"), tokens(tmp_path / "whole"))


def test_a_server_draws_with_them(model):
    served: Any = Served("tiny", model, batch=None)  # type: ignore[arg-type]
    for given, expected in (
        ({"prompt": "7"}, (3.0, 5)),
        ({"prompt": "7", "guidance_scale": 1, "top_k": 4}, (None, 4)),
        ({"prompt": " "}, (None, 5)),
    ):
        (request,) = served.generation(parsed(Generation, given, strings=False)).requests
        assert (request.drawing.guidance_scale, request.drawing.top_k) == expected
