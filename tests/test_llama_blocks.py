"""Llama's blocks: the reference engine is held to transformers' LlamaModel, engines with a cache to the reference."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from canvases import N, alone, finish, mixed_requests
from conftest import RUN_LLAMA
from llama_blocks import LLAMA, llama, llama_weights
from transformers import LlamaConfig, LlamaModel

from fastigpt.engine.blocks import require, why_unsupported
from fastigpt.engine.choose import BACKENDS, as_device, build, choose
from fastigpt.overflow import OverflowWatch, cannot_overflow
from fastigpt.spec import BlockSpec, ModelSpec

SHAPES = {
    "few key heads": LLAMA,
    "one key head": replace(LLAMA, block=replace(LLAMA.block, n_kv_head=1)),
    "linear head": replace(LLAMA, head_inner=None, block=replace(LLAMA.block, n_kv_head=4)),
    **{
        f"head_dim {dim}": replace(
            LLAMA, width=2 * dim, block=BlockSpec(2, 2, dim, 40, 1e-6, "gated_silu"), height=2, columns=3
        )
        for dim in (64, 96, 100, 128)
    },
}


RUNNING = [name for name in RUN_LLAMA if name != "reference"]


@pytest.fixture(params=RUNNING)
def running(request: pytest.FixtureRequest) -> str:
    """Every engine with a cache that runs these blocks here."""
    return request.param


@pytest.fixture(params=SHAPES)
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    return SHAPES[request.param]


def tokens_and_prefix(spec: ModelSpec, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, spec.n_tokens, (n, spec.n_positions), generator=generator)
    return tokens, torch.randint(0, spec.n_prefix_tokens, (n, 3), generator=generator)


def their_model(spec: ModelSpec, weights: dict[str, torch.Tensor], base: float = 100.0) -> LlamaModel:
    """transformers' model with these weights: its table of angles is the one of llama_blocks."""
    block = spec.block
    config = LlamaConfig(
        hidden_size=spec.width, intermediate_size=block.n_inner, num_hidden_layers=spec.n_layer,
        num_attention_heads=block.n_head, num_key_value_heads=block.n_kv_head, head_dim=block.head_dim,
        rms_norm_eps=block.norm_epsilon, vocab_size=2, attention_bias=True, mlp_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )  # fmt: skip
    model = LlamaModel(config).eval()
    found = {"embed_tokens.weight": torch.zeros(2, spec.width), "norm.weight": weights["norm"]}
    for i in range(spec.n_layer):
        ours, theirs = f"blocks.{i}.", f"layers.{i}."
        found[theirs + "input_layernorm.weight"] = weights[ours + "norm_1"]
        found[theirs + "post_attention_layernorm.weight"] = weights[ours + "norm_2"]
        for what in ("weight", "bias"):
            parts = weights[f"{ours}qkv.{what}"].split(block.sections)
            found |= {f"{theirs}self_attn.{x}_proj.{what}": part for x, part in zip("qkv", parts)}
            gate, up = weights[f"{ours}fc.{what}"].chunk(2)
            found |= {f"{theirs}mlp.gate_proj.{what}": gate, f"{theirs}mlp.up_proj.{what}": up}
            found[f"{theirs}self_attn.o_proj.{what}"] = weights[f"{ours}proj.{what}"]
            found[f"{theirs}mlp.down_proj.{what}"] = weights[f"{ours}out.{what}"]
    model.load_state_dict(found)
    return model


def test_the_reference_equals_transformers_llama(spec):
    weights = llama_weights(spec, seed=4)
    tokens, prefix = tokens_and_prefix(spec)
    embedded = torch.cat([weights["prefix.embedding"][prefix], weights["token.embedding"][tokens[:, :-1]]], 1)
    first = torch.arange(embedded.shape[1])[None]  # rotary positions are relative: ours begin at another row
    with torch.inference_mode():
        theirs = their_model(spec, weights)(inputs_embeds=embedded, position_ids=first).last_hidden_state[:, 2:]
    reference = build(spec, weights, backend="reference", device="cpu")
    assert (reference.hidden(tokens, spec.n_layer, prefix) - theirs).abs().max() <= 1e-4
    if spec.head_inner is not None:
        theirs = torch.nn.functional.gelu(theirs @ weights["head.fc.weight"].T + weights["head.fc.bias"])
    theirs = theirs @ weights["head.weight"].T + (0 if spec.head_inner is None else weights["head.bias"])
    ours = reference.logits(tokens, prefix)
    assert (ours - theirs).abs().max() <= 1e-4 and theirs.std() > 0.3


def test_engines_with_a_cache_equal_the_reference(spec, running):
    tokens, prefix = tokens_and_prefix(spec)
    truth, tested = llama("reference", spec), llama(running, spec, dtype="float32")
    assert (tested.logits(tokens, prefix) - truth.logits(tokens, prefix)).abs().max() <= 1e-4
    for layer in range(spec.n_layer + 1):
        assert (tested.hidden(tokens, layer, prefix) - truth.hidden(tokens, layer, prefix)).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_positions_are_exact_in_half_precision(dtype):
    """The table stays float32: bfloat16 cannot tell neighbours far down a canvas apart."""
    engine = llama("portable", dtype=dtype)
    assert engine.blocks.weights["rotary"].dtype == torch.float32
    tokens, prefix = tokens_and_prefix(LLAMA)
    ours, truth = engine.logits(tokens, prefix), llama("reference").logits(tokens, prefix)
    assert (ours - truth).norm() <= 3e-2 * truth.norm()


def test_a_position_whose_cosine_and_sine_are_zero_is_looked_at_like_any_other_of_its_kind(running):
    """As LlamaGen's condition: its key is zero, so it gets the score 0 from whoever looks."""
    weights = llama_weights()
    weights["rotary"][: LLAMA.prefix_length] = 0
    engines = [build(LLAMA, weights, backend=name, device="cpu", dtype="float32") for name in ("reference", running)]
    tokens, prefix = tokens_and_prefix(LLAMA)
    swapped = prefix[:, [1, 0, 2]]  # all score alike, so their order is not seen but by the last, which looks at itself
    first, again = (engine.logits(tokens, prefix) for engine in engines)
    assert (first - again).abs().max() <= 1e-4
    one_layer = replace(LLAMA, n_layer=1)
    engine = build(one_layer, weights, backend="reference", device="cpu")
    assert (engine.logits(tokens, prefix) - engine.logits(tokens, swapped)).abs().max() <= 1e-5


@pytest.mark.parametrize("window", [1, 4, "auto"])
def test_prefixes_of_many_lengths_share_a_batch(window, running):
    """Among them guided canvases whose negative prefix is of another length than their own."""
    truth, tested = llama("reference"), llama(running, dtype="float32")
    given = mixed_requests(truth, 8, seed=12)
    wanted = [
        replace(
            request,
            prefix=(1, 4, 0, 5)[-1 - i % 4 :],
            negative=None if request.negative is None else (3, 3, 5)[-1 - i % 3 :],
        )
        for i, request in enumerate(given)
    ]
    assert len({len(request.prefix) for request in wanted if request.negative}) > 1
    expected = torch.cat([alone(truth, request).tokens for request in wanted])
    with closing(tested.open(8, window=window)) as session:
        assert torch.equal(finish(session, session.add(wanted)).tokens, expected)


def test_a_smaller_model_of_the_same_canvas_drafts(running):
    truth, tested = llama("reference"), llama(running, dtype="float32")
    smaller = replace(LLAMA, n_layer=1, block=replace(LLAMA.block, n_kv_head=4), head_inner=None)
    wanted = mixed_requests(tested, 6, seed=3)
    expected = torch.cat([alone(truth, request).tokens for request in wanted])
    for draft in (tested, llama(running, smaller, dtype="float32")):
        with closing(tested.open(6, window=4, draft=draft)) as session:
            found = finish(session, session.add(wanted))
            assert torch.equal(found.tokens, expected)
            if draft is tested:  # it guesses what will be drawn
                assert found.pass_starts.sum() <= len(wanted) * N / 3


# --- who runs them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [name for name in BACKENDS if why_unsupported(name, LLAMA)])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, "blocks with rotary positions"),
        ({"positions": "learned"}, "blocks with gated MLPs"),
        ({"positions": "learned", "block": BlockSpec(4, 2, 4, 20, 1e-5)}, "fewer heads of keys than of queries"),
        ({"positions": "learned", "block": BlockSpec(4, 4, 5, 20, 1e-5)}, "heads whose widths do not add up"),
        ({"positions": "learned", "block": BlockSpec(4, 4, 4, 20, 1e-5)}, "image heads with a hidden layer"),
    ],
)
def test_engines_without_the_arithmetic_refuse_and_say_which_does(backend, change, what):
    spec = replace(LLAMA, **change)
    with pytest.raises(ValueError, match=f"the {backend} engine does not run {what}.* yet; backend='portable' does"):
        require(backend, spec)


def test_auto_chooses_one_that_can():
    assert build(LLAMA, llama_weights(), device="cpu").name == "cpu" == choose(as_device("cpu"), LLAMA)


# --- overflow ----------------------------------------------------------------------------------------------------


def test_weights_of_a_sane_size_are_proved_harmless():
    assert cannot_overflow(LLAMA, llama_weights())


@pytest.mark.parametrize("name", ["blocks.1.fc.weight", "blocks.0.qkv.weight", "head.fc.weight", "token.embedding"])
def test_weights_that_overflow_are_found(name):
    weights = llama_weights()
    weights[name] = weights[name] * 1e30
    weights["head.weight"] = weights["head.weight"] * 1e9
    assert not cannot_overflow(LLAMA, weights)
    tokens, prefix = tokens_and_prefix(LLAMA)
    with pytest.raises(ValueError, match="too large"):
        OverflowWatch(LLAMA, weights).check(tokens, prefix)
