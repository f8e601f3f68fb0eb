"""OpenAI's TensorFlow variables, renamed, give the model of their own code."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from conftest import engine, random_tokens

import fastigpt
from fastigpt import CheckpointError
from fastigpt.families.image_gpt.tensorflow import from_variables

N_LAYER, N_HEAD, N_EMBD, SIDE, COLORS = 2, 2, 12, 3, 7


def openai_variables() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.4).astype(np.float32)

    variables = {
        "wte": normal(COLORS, N_EMBD),
        "wtet": normal(COLORS, N_EMBD),
        "wpe": normal(SIDE * SIDE, N_EMBD),
        "sos": normal(N_EMBD),
        "ln_f/g": 1 + normal(N_EMBD),
    }
    head = (N_HEAD, N_EMBD // N_HEAD, N_EMBD)
    for i in range(N_LAYER):
        for part in ("q_proj", "k_proj", "v_proj", "c_proj"):
            variables[f"h{i}/attn/{part}"] = normal(*head)
        variables[f"h{i}/ln_1/g"] = 1 + normal(N_EMBD)
        variables[f"h{i}/ln_2/g"] = 1 + normal(N_EMBD)
        variables[f"h{i}/mlp/c_fc/w"] = normal(N_EMBD, 4 * N_EMBD)
        variables[f"h{i}/mlp/c_proj/w"] = normal(4 * N_EMBD, N_EMBD)
    return {"model/" + name: array for name, array in variables.items()}


def openai_logits(variables: dict[str, np.ndarray], tokens: torch.Tensor) -> torch.Tensor:
    """Their graph, einsum by einsum (image-gpt, src/model.py), in float64."""
    v = {name.removeprefix("model/"): torch.from_numpy(array).double() for name, array in variables.items()}

    def norm(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * g

    h = torch.cat([v["sos"].expand(len(tokens), 1, -1), v["wte"][tokens[:, :-1]]], 1) + v["wpe"][: tokens.shape[1]]
    future = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
    for i in range(N_LAYER):
        x = norm(h, v[f"h{i}/ln_1/g"])
        q, k, w = (torch.einsum("bsf,hef->bhse", x, v[f"h{i}/attn/{part}_proj"]) for part in "qkv")
        scores = (q @ k.mT / math.sqrt(N_EMBD / N_HEAD)).masked_fill(future, -math.inf)
        h = h + torch.einsum("bhse,hef->bsf", scores.softmax(-1) @ w, v[f"h{i}/attn/c_proj"])
        x = norm(h, v[f"h{i}/ln_2/g"]) @ v[f"h{i}/mlp/c_fc/w"]
        h = h + x * torch.sigmoid(1.702 * x) @ v[f"h{i}/mlp/c_proj/w"]
    return norm(h, v["ln_f/g"]) @ v["wtet"].T


def test_converted_variables_give_openais_logits():
    variables = openai_variables()
    config, weights = from_variables(variables)
    assert (config.n_layer, config.n_head, config.n_embd, config.height) == (N_LAYER, N_HEAD, N_EMBD, SIDE)
    assert config.n_colors == COLORS
    tokens = random_tokens(config, 3)
    logits = engine("reference", config, weights, dtype="float64").logits(tokens)
    assert (logits - openai_logits(variables, tokens)).abs().max() < 1e-5


def test_optimiser_slots_are_passed_over_and_missing_variables_named():
    variables = openai_variables()
    variables["model/h0/mlp/c_fc/w/Adam"] = np.zeros(3, np.float32)
    from_variables(variables)
    del variables["model/h1/attn/v_proj"]
    with pytest.raises(CheckpointError, match="model/h1/attn/v_proj"):
        from_variables(variables)


def test_without_tensorflow_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match="needs tensorflow: pip install tensorflow"):
        fastigpt.convert(tmp_path / "model.ckpt", tmp_path / "kmeans_centers.npy", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_with_tensorflow_a_real_checkpoint_converts_and_loads(tmp_path):
    tf = pytest.importorskip("tensorflow", reason="the extra tf is not installed")
    variables = openai_variables()
    names = list(variables)
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "model.ckpt-1"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(variables[name]) for name in names],
    )
    np.save(tmp_path / "kmeans_centers.npy", np.random.default_rng(0).uniform(-1, 1, (COLORS, 3)).astype(np.float32))
    out = fastigpt.convert(tmp_path / "model.ckpt-1", tmp_path / "kmeans_centers.npy", tmp_path / "out")
    model = fastigpt.load(out, backend="reference")
    tokens = random_tokens(model.config, 2)
    assert (model.logits(tokens) - openai_logits(variables, tokens)).abs().max() < 1e-4
    assert len(model.sample(2, seed=0)) == 2
    with pytest.raises(CheckpointError, match="missing"):
        fastigpt.convert(tmp_path / "other.ckpt", tmp_path / "kmeans_centers.npy", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("name", "bad", "word"),
    [
        ("wte", np.zeros(7, np.float32), "wte has shape"),
        ("wpe", np.zeros((9, 12, 1), np.float32), "wpe has shape"),
        ("wpe", np.zeros((0, 12), np.float32), "wpe has shape"),
        ("wpe", np.zeros((9, 11), np.float32), "wpe has shape"),
        ("wte", np.zeros((7, 12), np.int64), "wte is int64"),
        ("wtet", np.zeros((7, 12), np.complex64), "wtet is complex64"),
        ("sos", np.zeros(11, np.float32), "sos has shape"),
        ("h0/attn/q_proj", np.zeros((5, 6, 12), np.float32), "n_head"),
        ("h0/attn/q_proj", np.zeros((12, 12), np.float32), "give n_head"),
        ("h1/attn/k_proj", np.zeros((2, 6, 13), np.float32), "k_proj has shape"),
        ("h1/mlp/c_fc/w", np.zeros((12, 47), np.float32), "c_fc/w has shape"),
        ("h0/ln_1/g", np.array(["a"]), "ln_1/g is"),
        ("ln_f/g", np.full(12, 1e39), "NaN or infinite"),
        ("h7/ln_1/g", np.ones(12, np.float32), "lacks the variable model/h2/"),
    ],
)
def test_damaged_variables_are_named(name, bad, word):
    variables = openai_variables() | {"model/" + name: bad}
    with pytest.raises(CheckpointError, match=word):
        from_variables(variables, source="model.ckpt")


def test_positions_behind_the_square_are_passed_over():
    variables = openai_variables()
    config, weights = from_variables(variables)
    variables["model/wpe"] = np.concatenate([variables["model/wpe"], np.ones((2, N_EMBD), np.float32)])
    longer_config, longer = from_variables(variables)
    assert longer_config == config and torch.equal(longer["transformer.wpe.weight"], weights["transformer.wpe.weight"])


@pytest.mark.parametrize("n_head", [0, -1, 2.0, True, "2"])
def test_n_head_must_be_a_number_of_heads(tmp_path, n_head):
    with pytest.raises((ValueError, TypeError), match="n_head must be"):
        fastigpt.convert(tmp_path / "model.ckpt", tmp_path / "kmeans_centers.npy", tmp_path / "out", n_head=n_head)


class Reader:
    """Stands where TensorFlow's own reader does, which is not installed everywhere."""

    def __init__(self, variables: dict[str, np.ndarray], promised: int = 1) -> None:
        self.variables, self.promised = variables, promised

    def get_variable_to_shape_map(self):
        return {name: [*array.shape, self.promised] for name, array in self.variables.items()}

    def get_variable_to_dtype_map(self):
        return {name: type("DType", (), {"size": 4}) for name in self.variables}

    def get_tensor(self, name: str) -> np.ndarray:
        return self.variables[name]


@pytest.mark.parametrize("how", ["right", "a bomb", "an odd error", "a missing shard", "a directory"])
def test_tensorflows_reader_is_behind_the_same_door(tmp_path, monkeypatch, how):
    import types

    variables = openai_variables()

    def load_checkpoint(name: str) -> Reader:
        if how == "an odd error":
            raise AssertionError("deep inside")
        return Reader(variables, 10**9 if how == "a bomb" else 1)

    fake = types.SimpleNamespace(train=types.SimpleNamespace(load_checkpoint=load_checkpoint))
    monkeypatch.setitem(sys.modules, "tensorflow", fake)
    prefix = tmp_path / "model.ckpt-1"
    np.save(tmp_path / "kmeans_centers.npy", np.random.default_rng(0).uniform(-1, 1, (COLORS, 3)).astype(np.float32))
    if how == "a directory":
        (tmp_path / "model.ckpt-1.index").mkdir()
    else:
        (tmp_path / "model.ckpt-1.index").write_bytes(b"x")
    if how != "a missing shard":
        nbytes = sum(array.nbytes for array in variables.values())
        (tmp_path / "model.ckpt-1.data-00000-of-00001").write_bytes(b"\0" * nbytes)
    if how == "right":
        fastigpt.convert(prefix, tmp_path / "kmeans_centers.npy", tmp_path / "out")
        tokens = torch.zeros(1, SIDE * SIDE, dtype=torch.int64)
        found = fastigpt.load(tmp_path / "out", backend="reference").logits(tokens)
        assert (found - openai_logits(variables, tokens)).abs().max() < 1e-4
    else:
        with pytest.raises(CheckpointError, match=r"model\.ckpt-1"):
            fastigpt.convert(prefix, tmp_path / "kmeans_centers.npy", tmp_path / "out")
        assert not (tmp_path / "out").exists()
