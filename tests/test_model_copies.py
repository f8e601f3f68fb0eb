"""Models travel: pickled, copied, sent to another process, on any engine, they draw the same tokens."""

from __future__ import annotations

import copy
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CACHED, PROMPTED, random_tokens, random_weights

import fastigpt
from fastigpt import ImageGPT, ImageGPTConfig, Palette
from fastigpt.codecs.preprocessing import Preprocessing
from fastigpt.prompts import Vocabulary

BACKENDS = [*CACHED, "reference"]


def model(backend: str, **kwargs) -> ImageGPT:
    return ImageGPT(
        PROMPTED,
        random_weights(PROMPTED, biases=True),
        palette=Palette(np.random.default_rng(0).uniform(-1, 1, (9, 3)).astype(np.float32)),
        vocabulary=Vocabulary(("<pad>", "a", "red", "house", "tree"), 3),
        preprocessing=Preprocessing(resample=3),
        name="tiny",
        backend=backend,
        device="cpu",
        **kwargs,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "copy"])
def test_a_copy_is_the_same_model(backend, how):
    original = model(backend)
    original.sample(1, seed=0)  # one that has been used
    copies = {"pickle": lambda m: pickle.loads(pickle.dumps(m)), "deepcopy": copy.deepcopy, "copy": copy.copy}
    twin = copies[how](original)
    for name in ("config", "palette", "vocabulary", "preprocessing", "architecture", "name"):
        assert getattr(twin, name) == getattr(original, name), name
    for name in ("device", "dtype", "backend"):
        assert getattr(twin, name) == getattr(original, name), name
    assert twin.engine.kv_dtype == original.engine.kv_dtype and repr(twin) == repr(original)
    options = {"seed": 5, "prompt": "a red", "guidance_scale": 1.5, "top_k": 6, "output_type": "tokens"}
    assert torch.equal(twin.sample(3, **options), original.sample(3, **options))
    assert torch.equal(twin.logits(random_tokens(PROMPTED, 2)), original.logits(random_tokens(PROMPTED, 2)))
    shared = twin.weights["lm_head.weight"].data_ptr() == original.weights["lm_head.weight"].data_ptr()
    assert (how == "copy") == shared == (twin.engine is original.engine)


@pytest.mark.parametrize(("backend", "dtypes"), [("cpu", ("int8", "int8")), ("cpu", ("float32", "float32"))])
def test_a_copy_keeps_the_dtypes_that_were_asked_for(backend, dtypes):
    original = model(backend, dtype=dtypes[0], kv_dtype=dtypes[1])
    twin = pickle.loads(pickle.dumps(original))
    assert (twin.dtype, twin.engine.kv_dtype) == (original.dtype, original.engine.kv_dtype)
    tokens = [m.sample(2, seed=1, output_type="tokens") for m in (original, twin)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pickle_holds_the_weights_once(tmp_path, backend):
    config = ImageGPTConfig(n_layer=2, n_head=2, n_embd=64, height=16, width=16)
    original = ImageGPT.from_config(config, backend=backend, device="cpu")
    nbytes = sum(tensor.nbytes for tensor in original.weights.values())
    assert nbytes < len(pickle.dumps(original)) < 1.1 * nbytes + 40_000
    original.save_pretrained(tmp_path)
    loaded = fastigpt.load(tmp_path, backend=backend, device="cpu")
    assert len(pickle.dumps(loaded)) < 1.1 * nbytes + 40_000


def test_a_pickle_of_a_loaded_model_needs_no_file(tmp_path):
    model("portable").save_pretrained(tmp_path)
    data = pickle.dumps(fastigpt.load(tmp_path, backend="portable"))
    for path in tmp_path.iterdir():
        path.unlink()
    twin = pickle.loads(data)
    assert torch.equal(twin.logits(random_tokens(PROMPTED, 1)), model("portable").logits(random_tokens(PROMPTED, 1)))
    assert any(op.name == "REDUCE" for op, *_ in pickletools.genops(data))


def test_a_subclass_stays_one():
    class Mine(ImageGPT):
        pass

    mine = Mine(PROMPTED, random_weights(PROMPTED), backend="portable")
    assert type(copy.copy(mine)) is Mine and type(copy.deepcopy(mine)) is Mine


# --- paths -------------------------------------------------------------------------------------------------------


class Somewhere:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, Path, Somewhere])
def test_a_path_may_be_any_kind_of_path(tmp_path, kind):
    model("portable").save_pretrained(kind(tmp_path / "m"))
    loaded = fastigpt.load(kind(tmp_path / "m"), backend="portable")
    assert loaded.name == str(tmp_path / "m")
    again = fastigpt.sample(1, model=kind(tmp_path / "m"), seed=0, output_type="tokens", backend="portable")
    assert torch.equal(again, loaded.sample(1, seed=0, output_type="tokens"))
    loaded.sample(1, seed=0, draft=kind(tmp_path / "m"))
    np.save(tmp_path / "p.npy", loaded.palette.clusters)
    assert Palette.from_file(kind(tmp_path / "p.npy")) == loaded.palette


def test_other_kinds_of_names_are_refused():
    for name in (b"model", 3, ["model"], object()):
        with pytest.raises(TypeError):
            fastigpt.load(name)
        with pytest.raises(TypeError):
            Palette.from_file(name)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("m/model.safetensors", "load '.*m'"),
        ("m/config.json", "load '.*m'"),
        ("kmeans_centers.npy", r"Palette\.from_file"),
        ("model.ckpt-1000000.index", "fastigpt convert"),
        ("other.txt", "a checkpoint is a directory with config.json"),
    ],
)
def test_a_file_instead_of_a_directory_is_told_what_to_load(tmp_path, name, advice):
    model("portable").save_pretrained(tmp_path / "m")
    path = tmp_path / name
    if not path.exists():
        path.write_text("x")
    with pytest.raises(fastigpt.CheckpointError, match=f"is a file.*{advice}"):
        fastigpt.load(path)
