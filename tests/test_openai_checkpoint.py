"""OpenAI's TensorFlow variables, renamed, give the model of their own code."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from conftest import random_tokens

import fastigpt
from fastigpt import CheckpointError
from fastigpt.engine.reference import ReferenceEngine
from fastigpt.openai_checkpoint import from_variables

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
    logits = ReferenceEngine(config, weights, dtype=torch.float64).logits(tokens)
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
