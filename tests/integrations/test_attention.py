"""attn_implementation="fastigpt": the tokens and logits of "sdpa", and an error for what it does not compute."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, StaticCache

from fastigpt.integrations.attention import attention, register

register()


def gpt2(implementation: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **sizes) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 67, "n_positions": 96, "n_embd": 48, "n_layer": 3, "n_head": 3} | sizes
    config = GPT2Config(**sizes, initializer_range=0.2, bos_token_id=0, eos_token_id=None, pad_token_id=None)
    model = GPT2LMHeadModel(config).eval().to(device, dtype)
    model.set_attn_implementation(implementation)
    return model


def ids(batch: int, length: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(0, 67, (batch, length), generator=torch.Generator().manual_seed(length)).to(device)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which operators run."""
    names: list[str] = []
    for name in ("causal_attention", "decode_attention"):
        original = getattr(torch.ops.fastigpt, name)

        def spy(*arguments, name=name, original=original):
            names.append(name)
            return original(*arguments)

        monkeypatch.setattr(torch.ops.fastigpt, name, spy)
    return names


@pytest.mark.parametrize("sizes", [{}, {"n_embd": 40, "n_head": 1}, {"n_embd": 192, "n_head": 2}], ids=str)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2), (2, 33)])
def test_generated_tokens_are_those_of_sdpa(sizes, batch, length, calls):
    prompt = ids(batch, length)
    expected = gpt2("sdpa", **sizes).generate(prompt, max_new_tokens=40, do_sample=False)
    found = gpt2("fastigpt", **sizes).generate(prompt, max_new_tokens=40, do_sample=False)
    assert torch.equal(found, expected)
    assert calls.count("causal_attention") == 3 and calls.count("decode_attention") == 3 * 39


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", [None, "static"])
def test_logits_on_a_gpu_are_those_of_sdpa(dtype, cache):
    prompt = ids(4, 33, "cuda")
    call = {"max_new_tokens": 40, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    call |= {"output_logits": True, "return_dict_in_generate": True}
    expected = gpt2("sdpa", dtype, "cuda", n_embd=192).generate(prompt, **call)
    found = gpt2("fastigpt", dtype, "cuda", n_embd=192).generate(prompt, **call)
    if dtype == torch.float32:
        assert torch.equal(found.sequences, expected.sequences)
    tolerance = 2e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(found.logits[0], expected.logits[0], atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    prompt = ids(2, 20)
    with torch.no_grad():
        exact = gpt2("sdpa")(prompt).logits
        theirs = gpt2("sdpa", dtype)(prompt).logits
        ours = gpt2("fastigpt", dtype)(prompt).logits
    assert ours.dtype == dtype
    assert (ours - exact).norm() < 1.2 * (theirs - exact).norm() + 1e-3


@pytest.mark.parametrize("window", [1, 2, 5, 16, 17, 30])
def test_windows_after_a_cache_of_any_kind(window):
    """Chunked prefill and what assistants do: several tokens at once behind those that are cached."""
    tokens = ids(2, 64)
    model = gpt2("fastigpt")
    with torch.no_grad():
        expected = gpt2("sdpa")(tokens).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=80)):
            parts = [model(tokens[:, :20], past_key_values=cache).logits]
            for first in range(20, 64, window):
                parts.append(model(tokens[:, first : first + window], past_key_values=cache).logits)
            torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-5, rtol=1e-4)


def test_static_caches_generate_the_same_tokens():
    prompt = ids(2, 21)
    expected = gpt2("sdpa").generate(prompt, max_new_tokens=30, do_sample=False)
    found = gpt2("fastigpt").generate(prompt, max_new_tokens=30, do_sample=False, cache_implementation="static")
    assert torch.equal(found, expected)


def test_no_cache_and_a_mask_without_padding():
    prompt = ids(3, 12)
    call = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    expected = gpt2("sdpa").generate(prompt, **call)
    assert torch.equal(gpt2("fastigpt").generate(prompt, **call), expected)
    assert torch.equal(gpt2("fastigpt").generate(prompt, use_cache=False, **call), expected)


def test_a_llama_with_as_many_key_heads_as_heads():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    expected = model.generate(ids(2, 9), max_new_tokens=12, do_sample=False, eos_token_id=None)
    model.set_attn_implementation("fastigpt")
    assert torch.equal(model.generate(ids(2, 9), max_new_tokens=12, do_sample=False, eos_token_id=None), expected)


@pytest.mark.parametrize(
    ("sizes", "arguments", "word"),
    [
        ({}, {"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}, "padding"),
        ({}, {"attention_mask": torch.ones(2, 1, 4, 4, dtype=torch.bool)}, "custom mask"),
        ({}, {"position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": False}, "packed"),
        ({"scale_attn_weights": False}, {}, "scaling"),
        ({"scale_attn_by_inverse_layer_idx": True}, {}, "scaling"),
        ({"add_cross_attention": True}, {"encoder_hidden_states": torch.zeros(2, 3, 48)}, "cross-attention|encoder"),
    ],
    ids=["padding", "custom", "packed", "scale", "layer scale", "cross-attention"],
)
def test_what_the_operators_do_not_compute_is_refused(sizes, arguments, word):
    with torch.no_grad(), pytest.raises(ValueError, match=f'attn_implementation="fastigpt" does not do .*({word})'):
        gpt2("fastigpt", **sizes)(ids(2, 4), **arguments)


@pytest.mark.parametrize(
    ("argument", "word"),
    [({"softcap": 30.0}, "softcap"), ({"sliding_window": 4}, "sliding_window"), ({"is_causal": False}, "not causal")],
)
def test_what_layers_ask_for_is_refused(argument, word):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=word):
        attention(torch.nn.Module(), q, q, q, None, **argument)
    with pytest.raises(ValueError, match="5 keys for 4 queries"):
        attention(torch.nn.Module(), q, torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), None)


def test_training_is_refused():
    model = gpt2("fastigpt")
    with pytest.raises(ValueError, match="gradients"):
        model(ids(2, 4))
    with torch.no_grad(), pytest.raises(ValueError, match=r"dropout=0\.1"):
        model.train()(ids(2, 4))


@pytest.mark.parametrize(
    ("options", "word"),
    [({"num_key_value_heads": 1}, "1 key heads for 2"), ({"sliding_window": 4}, "sliding")],
    ids=["grouped heads", "sliding window"],
)
def test_other_kinds_of_attention_are_refused(options, word):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": None}
    model = MistralForCausalLM(MistralConfig(**(sizes | options))).eval()
    model.set_attn_implementation("fastigpt")
    with torch.no_grad(), pytest.raises(ValueError, match=word):
        model(ids(1, 9))


@pytest.mark.parametrize("window", [1, 3, 20])
def test_lazily_negated_views_count_as_the_numbers_that_torch_shows(window):
    module, slot = torch.nn.Module(), torch.full((2, 1, 1, 24), 24 - window, dtype=torch.int32)
    query, key, value = torch.randn(2, 3, window, 8), torch.randn(2, 3, 24, 8), torch.randn(2, 3, 24, 8)
    lazily = [torch.complex(torch.zeros_like(x), -x).conj().imag for x in (query, key, value)]
    assert all(x.is_neg() for x in lazily)
    assert torch.equal(attention(module, *lazily, slot)[0], attention(module, query, key, value, slot)[0])


def test_attention_compiles_as_one_graph():
    module, slot = torch.nn.Module(), torch.full((2, 1, 1, 24), 23, dtype=torch.int32)
    arguments = (module, torch.randn(2, 3, 1, 8), torch.randn(2, 3, 24, 8), torch.randn(2, 3, 24, 8), slot)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments)[0], attention(*arguments)[0])
