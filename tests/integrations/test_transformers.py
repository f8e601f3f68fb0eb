"""accelerate: ours and transformers' generate give the same for the same call, or ours says it does not serve it."""

from __future__ import annotations

import pytest
import torch
from accelerated import IDS, START, served, twins
from conftest import HEAD_DIM_96, ODD, TINY, huggingface_model, random_weights
from scipy.stats import chisquare
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper

from fastigpt import ImageGPTConfig
from fastigpt.engine import loop

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
