"""accelerate: ours and transformers' generate give the same for the same call, or ours says it does not serve it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
import weakref
from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch
from conftest import HEAD_DIM_96, ODD, TINY, huggingface_model, random_weights
from scipy.stats import chisquare
from transformers import (
    GenerationConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTModel,
    LogitsProcessorList,
    TemperatureLogitsWarper,
)

import fastigpt
from fastigpt import ImageGPTConfig
from fastigpt.engine import loop
from fastigpt.integrations.hf_weights import checksum

START = TINY.start_token
IDS = torch.tensor([[START, 1, 2], [START, 4, 4]])


def twins(config: ImageGPTConfig = TINY, backend: str = "auto", *, seed: int = 0, biases: bool = True, **options):
    """The same model twice: transformers' own and an accelerated one."""
    weights = random_weights(config, seed, biases=biases)
    theirs, ours = (huggingface_model(config, weights) for _ in range(2))
    return theirs, fastigpt.accelerate(ours, backend=backend, **options)


def served(model: ImageGPTForCausalImageModeling, *args, **kwargs):
    """The result of generate, and a failure if it fell back."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this call of generate")
        return model.generate(*args, **kwargs)


# --- the same tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, ODD, HEAD_DIM_96], ids=["tiny", "odd", "head_dim_96"])
@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
def test_greedy_tokens_are_the_originals(backend, config, biases):
    theirs, ours = twins(config, backend, biases=biases)
    ids = torch.tensor([[config.start_token, 1], [config.start_token, 0]])
    expected = theirs.generate(ids, max_length=config.n_pixels + 1)
    found = served(ours, ids, max_length=config.n_pixels + 1)
    assert torch.equal(found, expected) and found.dtype == expected.dtype


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"max_length": 4},
        {"max_length": 17},
        {"max_new_tokens": 1},
        {"max_new_tokens": 5, "max_length": 9},
        {"max_new_tokens": 5, "use_cache": False},
        {"max_new_tokens": 5, "do_sample": True, "top_k": 1},
        {"max_new_tokens": 5, "do_sample": True, "top_p": 1e-6},
        {"max_new_tokens": 5, "do_sample": True, "temperature": 1e-6},
        {"max_new_tokens": 5, "attention_mask": torch.ones(2, 3, dtype=torch.int64)},
        {"max_new_tokens": 5, "position_ids": torch.arange(3)[None]},
        {"max_new_tokens": 5, "pad_token_id": 0},
        {"max_new_tokens": 5, "eos_token_id": 50256},
        {"max_new_tokens": 5, "output_scores": True},
        {"max_new_tokens": 5, "renormalize_logits": True, "repetition_penalty": 1.0, "num_beams": 1},
        {"generation_config": GenerationConfig(max_new_tokens=6)},
        {"generation_config": GenerationConfig(max_length=11, do_sample=True, top_k=1, num_return_sequences=2)},
        {"max_new_tokens": 3, "do_sample": True, "top_k": 1, "num_return_sequences": 3},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_call_means_what_it_means_to_transformers(call):
    theirs, ours = twins()
    expected = theirs.generate(IDS, **call)
    for arguments in ({"inputs": IDS}, {"input_ids": IDS}, {"input_ids": IDS.int()}):
        found = served(ours, **arguments, **call)
        assert torch.equal(found, expected) and found.dtype == torch.int64


def test_defaults_come_from_the_models_generation_config():
    theirs, ours = twins()
    for model in (theirs, ours):
        model.generation_config.max_length = 8
        model.generation_config.bos_token_id = START
    assert torch.equal(served(ours, IDS), theirs.generate(IDS))
    assert torch.equal(served(ours), theirs.generate())


def test_static_caches_change_nothing():
    """In transformers 5.23 they change most greedy tokens of this model."""
    theirs, ours = twins()
    expected = theirs.generate(IDS, max_length=17)
    assert torch.equal(served(ours, IDS, max_length=17, cache_implementation="static"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_stay_in_it(dtype):
    _, ours = twins()
    ours.to(dtype)
    assert served(ours, IDS, max_length=17).shape == (2, 17)
    assert ours.generate.engine().dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_that_moves_to_a_gpu_is_served_there():
    theirs, ours = twins(HEAD_DIM_96)
    ids = torch.tensor([[512, 1], [512, 0]])
    expected = theirs.to("cuda").generate(ids.to("cuda"), max_length=65)
    found = served(ours.to("cuda"), ids.to("cuda"), max_length=65)
    assert torch.equal(found, expected) and found.device.type == "cuda"
    assert ours.generate.engine().device.type == "cuda"


# --- the same distribution ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 0},
        {"top_k": 0, "temperature": 1.7},
        {"top_k": 4},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 5, "top_p": 0.7},
    ],
    ids=str,
)
def test_the_first_two_tokens_follow_the_models_distribution(backend, filters):
    theirs, ours = twins(backend=backend)
    n = 6000
    found = served(ours, IDS[:1], max_new_tokens=2, do_sample=True, num_return_sequences=n, seed=11, **filters)
    assert torch.equal(found[:, :3], IDS[:1].expand(n, 3))
    first = _probabilities(theirs, IDS[:1], **filters)[0]
    extended = torch.cat([IDS[:1].expand(9, 3), torch.arange(9)[:, None]], 1)
    joint = (first[:, None] * _probabilities(theirs, extended, **filters)).flatten()
    counts = torch.bincount(found[:, 3] * 9 + found[:, 4], minlength=81)
    assert (counts[joint == 0] == 0).all()
    likely = joint * n >= 5  # the rest goes into one cell
    expected = torch.cat([joint[likely] * n, (joint[~likely].sum() * n)[None]])
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    keep = expected > 0.5
    assert chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue > 1e-3


@torch.no_grad()
def _probabilities(model, ids, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """float64 [B, n_colors] of the next token, filtered as the definition of each filter says."""
    p = (model(ids).logits[:, -1].double() / temperature).softmax(-1)
    ranked, order = p.sort(-1, descending=True)
    if top_k:
        ranked[:, top_k:] = 0
        ranked = ranked / ranked.sum(-1, keepdim=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
    p = torch.zeros_like(p).scatter(-1, order, ranked)
    return p / p.sum(-1, keepdim=True)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_sampling_takes_the_fifty_best_colours_unless_told_otherwise():
    config = ImageGPTConfig(n_layer=1, n_head=2, n_embd=8, height=3, width=3, n_colors=60)
    theirs, ours = twins(config)
    ids = torch.tensor([[60]])
    with torch.no_grad():
        best = theirs(ids).logits[0, -1].topk(50).indices
    drawn = served(ours, ids, do_sample=True, num_return_sequences=3000, temperature=50.0, seed=0)[:, 1]
    assert set(drawn.tolist()) == set(best.tolist())
    everything = served(ours, ids, do_sample=True, num_return_sequences=3000, temperature=50.0, seed=0, top_k=0)[:, 1]
    assert len(set(everything.tolist())) == 60


def test_seeds_generators_and_torchs_own_seed_repeat_a_draw():
    _, ours = twins()
    call = {"max_length": 17, "do_sample": True}
    torch.manual_seed(7)
    first, second = served(ours, IDS, **call), served(ours, IDS, **call)
    torch.manual_seed(7)
    assert torch.equal(served(ours, IDS, **call), first) and not torch.equal(first, second)
    assert torch.equal(served(ours, IDS, seed=3, **call), served(ours, IDS, seed=3, **call))
    a, b = (torch.Generator().manual_seed(5) for _ in range(2))
    assert torch.equal(served(ours, IDS, generator=a, **call), served(ours, IDS, generator=b, **call))
    state = torch.get_rng_state()
    served(ours, IDS, max_length=17)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="not both"):
        ours.generate(IDS, seed=1, generator=a, **call)


def test_returned_sequences_share_the_prefix_of_their_image(monkeypatch):
    _, ours = twins()
    jobs: list[list[list[int]]] = []
    run = loop.run

    def noted(engine, requests, **how):
        jobs.append([request.tokens[request.tokens >= 0].tolist() for request in requests])
        return run(engine, requests, **how)

    monkeypatch.setattr(loop, "run", noted)
    found = served(ours, IDS, do_sample=True, num_return_sequences=4, max_length=17, seed=0)
    assert torch.equal(found[:, :3], IDS.repeat_interleave(4, 0))
    assert len({tuple(row) for row in found.tolist()}) == 8
    assert jobs == [[IDS[0, 1:].tolist()] * 4 + [IDS[1, 1:].tolist()] * 4]  # equal ones of one call are read once


# --- what is not served ------------------------------------------------------------------------------------------


class Streamer:
    def put(self, value: torch.Tensor) -> None: ...
    def end(self) -> None: ...


@pytest.mark.parametrize(
    ("ids", "arguments", "word"),
    [
        (IDS, {"num_beams": 3}, "num_beams"),
        (IDS, {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(2.0)])}, "logits_processor"),
        (IDS, {"prefix_allowed_tokens_fn": lambda i, ids: [1, 2]}, "prefix_allowed_tokens_fn"),
        (IDS, {"streamer": Streamer()}, "streamer"),
        (IDS[:1], {"assistant_model": huggingface_model(TINY, random_weights(TINY, 4))}, "assistant_model"),
        (IDS, {"repetition_penalty": 1.3}, "RepetitionPenalty"),
        (IDS, {"do_sample": True, "min_p": 0.99, "top_k": 1}, "MinP"),
        (IDS, {"suppress_tokens": [1]}, "SuppressTokens"),
        (IDS, {"max_time": 100.0}, "MaxTime"),
        (IDS, {"eos_token_id": 7}, "eos_token_id"),
        (IDS, {"attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}, "attention_mask"),
        (IDS, {"pad_token_id": 2}, "pad_token_id"),
        (IDS, {"position_ids": torch.tensor([[0, 2, 3]])}, "position_ids"),
        (IDS[:, 1:], {}, "start token"),
        (torch.tensor([[START, START, 2]]), {}, "start token"),
        (IDS, {"inputs_embeds": torch.zeros(2, 3, 16)}, "inputs_embeds"),
    ],
    ids=lambda value: next(iter(value), "ids") if isinstance(value, dict) else None,
)
def test_what_cannot_be_honoured_goes_to_the_original_after_one_warning(ids, arguments, word):
    theirs, ours = twins()
    expected = _outcome(theirs, ids, arguments)
    with pytest.warns(UserWarning, match=f"this call of generate has .*{word}") as caught:
        found = _outcome(ours, ids, arguments)
    assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
    assert sum("this call of generate" in str(w.message) for w in caught) == 1
    with pytest.raises(ValueError, match=f"seed was given.*{word}"):
        ours.generate(ids, max_new_tokens=4, seed=1, **arguments)


def _outcome(model, ids, arguments):
    """The tokens, or the name of the error."""
    try:
        return model.generate(ids, max_new_tokens=4, **arguments)
    except (ValueError, NotImplementedError, TypeError) as error:
        return type(error).__name__


def test_dictionaries_of_results_are_the_originals():
    theirs, ours = twins()
    call = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True}
    expected = theirs.generate(IDS, **call)
    with pytest.warns(UserWarning, match="return_dict_in_generate"):
        found = ours.generate(IDS, **call)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores))


def test_dropout_and_hooks_are_the_originals_business():
    _, ours = twins()
    ours.train()
    with pytest.warns(UserWarning, match="training mode"):
        ours.generate(IDS, max_new_tokens=2)
    ours.eval()
    calls = []
    hook = ours.transformer.h[0].mlp.register_forward_hook(lambda *args: calls.append(1))
    with pytest.warns(UserWarning, match="hooks"):
        ours.generate(IDS, max_new_tokens=2)
    assert calls
    hook.remove()
    served(ours, IDS, max_new_tokens=2)


@pytest.mark.parametrize(
    ("ids", "arguments", "word"),
    [
        (IDS, {"max_length": 18}, "max_length must be at most 17"),
        (IDS, {"max_new_tokens": 15}, "max_length must be at most 17"),
        (IDS, {"max_length": 3}, "max_length"),
        (IDS, {"num_return_sequences": 2}, "num_return_sequences"),
        (IDS, {"maximum": 3}, "maximum"),
        (IDS, {"do_sample": True, "temperature": -1.0}, "temperature"),
        (IDS, {"do_sample": True, "seed": -1}, "seed"),
        (torch.tensor([[START, 77]]), {"max_length": 9}, "between 0 and 8"),
    ],
)
def test_impossible_calls_are_refused(ids, arguments, word):
    _, ours = twins()
    with pytest.raises(ValueError, match=word):
        ours.generate(ids, **arguments)


# --- weights -----------------------------------------------------------------------------------------------------


def _train(model) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(IDS).logits.square().mean().backward()
    optimizer.step()


def _write_data(model) -> None:
    model.lm_head.weight.data.mul_(-1)  # leaves the version counter as it is


def _swap_rows(model) -> None:
    rows = model.lm_head.weight.data
    rows[[1, 7]] = rows[[7, 1]]  # the same numbers, so any sum of them is the same


def _swap_columns(model) -> None:
    columns = model.transformer.h[0].mlp.c_fc.weight.data
    columns[:, [3, 8]] = columns[:, [8, 3]]


def _swap_layers(model) -> None:
    first, second = (block.mlp.c_proj.weight.data for block in model.transformer.h)
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def _change_signs(model) -> None:
    model.lm_head.weight.data[:, 1:6:4] *= -1  # the top bit of eighteen 64-bit words: their sum stays as it was


def _write_one_number(model) -> None:
    model.transformer.h[1].mlp.c_proj.bias.data[3] += 60


def _load(model) -> None:
    model.load_state_dict(huggingface_model(TINY, random_weights(TINY, 9)).state_dict())


def _replace(model) -> None:
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())


def _convert(model) -> None:
    model.to(torch.bfloat16).float()


MOVES = [_swap_rows, _swap_columns, _swap_layers, _change_signs]
CHANGES = [_train, _write_data, _write_one_number, _load, _replace, _convert, *MOVES]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_noticed(change):
    theirs, ours = twins()
    before = served(ours, IDS, max_length=17)
    for model in (theirs, ours):
        change(model)
    expected = theirs.generate(IDS, max_length=17)
    assert torch.equal(served(ours, IDS, max_length=17), expected)
    if change is not _convert:
        assert not torch.equal(before, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_changes_places_changes_the_checksum(dtype):
    """Also across the pieces a large tensor is read in, and in the bytes that fill no word of eight."""
    values = torch.arange(300_001, dtype=torch.float64).sub(150_000).div(64).to(dtype)
    before = checksum(values)
    assert torch.equal(checksum(values.clone()), before)
    for a, b in ((0, 1), (5, 262_144), (299_999, 300_000), (0, 300_000), (2, 2 + 131_072)):
        other = values.clone()
        other[[a, b]] = other[[b, a]]
        assert torch.equal(other, values) or not torch.equal(checksum(other), before), (a, b)
        other = values.clone()
        other[[a, b]] *= -1
        assert not torch.equal(checksum(other), before), (a, b)
    blocks = torch.cat([values[150_000:], values[:150_000]])
    assert not torch.equal(checksum(blocks), before)


def test_parameters_may_be_slices_of_one_buffer():
    theirs, ours = twins()
    buffer = torch.zeros(sum(p.numel() for p in ours.parameters()) + 1)
    first = 1
    for parameter in ours.parameters():
        place = buffer[first : first + parameter.numel()].view_as(parameter)
        parameter.data = place.copy_(parameter.data)
        first += parameter.numel()
    expected = theirs.generate(IDS, max_length=17)
    assert torch.equal(served(ours, IDS, max_length=17), expected)
    buffer.neg_()
    for parameter in theirs.parameters():
        parameter.data.neg_()
    assert torch.equal(served(ours, IDS, max_length=17), theirs.generate(IDS, max_length=17))


def test_the_engine_is_kept_while_the_weights_are():
    _, ours = twins()
    engine = ours.generate.engine()
    served(ours, IDS, max_length=17)
    assert ours.generate.engine() is engine


def test_weights_are_shared_with_the_module():
    _, ours = twins(backend="portable")
    engine = ours.generate.engine()
    parameters = dict(ours.named_parameters())
    assert all(tensor.data_ptr() == parameters[name].data_ptr() for name, tensor in engine.weights.items())
    shared = {
        "token.embedding": "transformer.wte.weight",
        "positions": "transformer.wpe.weight",
        "head.weight": "lm_head.weight",
        "blocks.0.norm_1": "transformer.h.0.ln_1.weight",
    }
    weights = engine.engine.blocks.weights
    assert all(weights[ours].data_ptr() == parameters[theirs].data_ptr() for ours, theirs in shared.items())


def test_an_accelerated_model_goes_when_its_last_user_does():
    _, ours = twins()
    served(ours, IDS, max_length=17)
    gone = weakref.ref(ours)
    del ours
    assert gone() is None


def bound(model):
    return model.generate


@pytest.mark.parametrize(
    "hold",
    [
        bound,
        lambda model: partial(model.generate, max_length=17),
        lambda model: {"f": model.generate}["f"].__call__,
        lambda model: copy.deepcopy(model).generate,
        lambda model: pickle.loads(pickle.dumps(model.generate)),
        lambda model: copy.deepcopy(model.generate),
        lambda model: lambda *args, **kwargs: model.generate(*args, **kwargs),
        lambda model: fastigpt.accelerate(fastigpt.restore(model)).generate,
    ],
    ids=["bound", "partial", "kept", "of a copy", "unpickled", "copied", "closure", "again"],
)
def test_a_bound_generate_keeps_its_model(hold):
    theirs, ours = twins()
    expected = theirs.generate(IDS, max_length=17)
    call = hold(ours)
    del ours
    assert torch.equal(call(IDS, max_length=17), expected)
    assert torch.equal(twins()[1].generate(IDS, max_length=17), expected)  # a temporary


def test_a_model_goes_with_the_last_bound_generate():
    _, ours = twins()
    generate, gone = ours.generate, weakref.ref(ours)
    assert generate == ours.generate and generate.__self__ is ours and generate.__name__ == "generate"
    assert generate != twins()[1].generate
    del ours
    assert gone() is not None
    generate(IDS, max_length=17)
    del generate
    assert gone() is None


def test_an_accelerated_model_is_still_of_its_class(tmp_path):
    theirs, ours = twins()
    assert isinstance(ours, ImageGPTForCausalImageModeling) and repr(ours) == repr(theirs)
    for name in ("__name__", "__qualname__", "__module__", "config_class", "main_input_name"):
        assert getattr(type(ours), name) == getattr(type(theirs), name)
    assert ours.can_generate() and list(ours.state_dict()) == list(theirs.state_dict())
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ImageGPTForCausalImageModeling"]
    fresh = type(ours).from_pretrained(tmp_path)  # an instance that nobody accelerated
    with pytest.raises(ValueError, match="seed"):
        fresh.generate(IDS, max_length=17, seed=1)
    assert torch.equal(type(ours).generate(ours, IDS, max_length=17), theirs.generate(IDS, max_length=17))


def test_subclasses_and_wrappers_of_an_accelerated_model_work(tmp_path):
    class Own(ImageGPTForCausalImageModeling):
        def generate(self, *args, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            return super().generate(*args, **kwargs)

    theirs, _ = twins()
    own = Own(theirs.config).eval()
    own.load_state_dict(theirs.state_dict())
    expected = theirs.generate(IDS, max_length=17)
    ours = fastigpt.accelerate(own)
    assert torch.equal(served(ours, IDS, max_length=17), expected) and ours.calls == 1  # its own still prepares
    assert type(fastigpt.restore(ours)) is Own
    _, ours = twins()
    assert torch.equal(torch.compile(ours, backend="eager").generate(IDS, max_length=17), expected)
    torch.save(ours, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(served(again, IDS, max_length=17), expected) and "generate" not in vars(again)
    assert type(fastigpt.restore(again)) is ImageGPTForCausalImageModeling


def test_a_patch_of_generate_can_be_undone(monkeypatch):
    theirs, ours = twins()
    with monkeypatch.context() as patch:
        patch.setattr(ours, "generate", lambda *args: "patched")
        assert ours.generate(IDS) == "patched"
    assert torch.equal(served(ours, IDS, max_length=17), theirs.generate(IDS, max_length=17))
    assert "generate" not in vars(fastigpt.restore(ours))
    with pytest.raises(TypeError, match="hf_model"):
        fastigpt.restore("imagegpt")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_generate_from_their_own_weights(duplicate):
    theirs, ours = twins()
    other = duplicate(ours)
    _write_data(other)
    _write_data(theirs)
    assert torch.equal(served(other, IDS, max_length=17), theirs.generate(IDS, max_length=17))
    assert not torch.equal(served(ours, IDS, max_length=17), served(other, IDS, max_length=17))


# --- accelerate and restore --------------------------------------------------------------------------------------


def test_restore_gives_the_original_back_and_others_are_untouched():
    theirs, ours = twins()
    assert "generate" not in vars(theirs)
    assert fastigpt.accelerate(ours) is ours
    assert fastigpt.restore(ours) is ours and "generate" not in vars(ours)
    assert ours.generate.__func__ is ImageGPTForCausalImageModeling.generate
    assert fastigpt.restore(ours) is ours
    with pytest.raises(ValueError, match="seed"):
        ours.generate(IDS, max_length=17, seed=1)


def test_a_model_still_saves_and_scores_as_before(tmp_path):
    theirs, ours = twins()
    ours.save_pretrained(tmp_path)
    again = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)


def test_models_that_cannot_be_run_are_refused():
    weights = random_weights(TINY)
    with pytest.raises(TypeError, match="ImageGPTModel"):
        fastigpt.accelerate(ImageGPTModel(huggingface_model(TINY, weights).config))
    with pytest.raises(ValueError, match="float64"):
        fastigpt.accelerate(huggingface_model(TINY, weights).double())
    assert fastigpt.accelerate(huggingface_model(TINY, weights).double(), dtype="float32")
    with pytest.raises(ValueError, match="NaN"):
        broken = huggingface_model(TINY, weights)
        broken.lm_head.weight.data[0, 0] = float("nan")
        fastigpt.accelerate(broken)
    with pytest.raises(ValueError, match="adapted"):
        adapted = huggingface_model(TINY, weights)
        adapted.transformer.h[0].mlp.extra = torch.nn.Linear(2, 2)
        fastigpt.accelerate(adapted)
    with pytest.raises(ValueError, match="meta"):
        fastigpt.accelerate(huggingface_model(TINY, weights).to("meta"))
    other = huggingface_model(TINY, weights)
    other.config.activation_function = "gelu"
    with pytest.raises(ValueError, match="activation_function"):
        fastigpt.accelerate(other)
    patched = huggingface_model(TINY, weights)
    patched.generate = lambda: None
    with pytest.raises(ValueError, match="replaced"):
        fastigpt.accelerate(patched)


def test_transformers_is_imported_only_when_asked_for():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import fastigpt\n"
        "try: fastigpt.accelerate(object())\n"
        "except ImportError as error: assert 'pip install' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


MEMORY = """
import gc, sys
from pathlib import Path
import torch
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling
import fastigpt

torch.set_num_threads(1)


def resident():
    gc.collect()
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").open() if l.startswith("VmRSS"))


def model(layers, width):
    config = ImageGPTConfig(n_layer=layers, n_embd=width, n_head=8)
    return ImageGPTForCausalImageModeling(config).eval().to(getattr(torch, sys.argv[1]))


tiny = fastigpt.accelerate(model(1, 64), backend="cpu")  # whatever is imported and started once
large = model(5, 512)
before = resident()
fastigpt.accelerate(large, backend="cpu", dtype=sys.argv[2])
print(resident() - before)
"""


def cpu_engine_bytes(config: ImageGPTConfig, dtype: torch.dtype) -> int:
    """What docs/embedding.md states: matrices in dtype (int8: a float32 scale and an int32 sum for each output, and the
    head in bfloat16), embeddings, norms and biases in float32."""
    total = 0
    for name, shape in (config.tensor_shapes() | config.bias_shapes()).items():
        numbers = prod(shape)
        if len(shape) == 1 or name.endswith(("wte.weight", "wpe.weight")):
            total += 4 * numbers
        elif dtype == torch.int8:
            total += 2 * numbers if name == "lm_head.weight" else numbers + 8 * shape[1]
        else:
            total += dtype.itemsize * numbers
    return total


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident size from /proc")
@pytest.mark.parametrize("module, dtype", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "int8")])
def test_the_cpu_engine_adds_the_stated_memory_and_no_more(module, dtype, tmp_path):
    command = [sys.executable, "-c", MEMORY, module, dtype]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    stated = cpu_engine_bytes(ImageGPTConfig(n_layer=5, n_head=8, n_embd=512), getattr(torch, dtype))
    assert abs(int(run.stdout.split()[-1]) - stated) < 12e6, (run.stdout, stated)


def test_the_page_states_the_memory_of_every_size_and_dtype():
    page = (Path(__file__).parents[2] / "docs" / "embedding.md").read_text()
    for name in ("small", "medium", "large"):
        sizes = [cpu_engine_bytes(ImageGPTConfig.preset(name), t) for t in (torch.float32, torch.bfloat16, torch.int8)]
        cells = [f"{b / 1e6:.0f} MB" if name == "small" else f"{b / 1e9:.2f} GB" for b in sizes]
        assert f"| {name} | {' | '.join(cells)} |" in page
