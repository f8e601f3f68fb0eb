"""An accelerated Janus draws what transformers' own class draws, where that is right."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from tiny_janus import CODES, IMAGE_ID, PAD_ID, SIDE, START_ID, their_model
from transformers import GenerationConfig, JanusForConditionalGeneration, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper

import fastigpt

N = SIDE * SIDE
IMAGE: dict[str, Any] = {"generation_mode": "image"}


@pytest.fixture(scope="module")
def theirs() -> JanusForConditionalGeneration:
    return their_model()


@pytest.fixture(scope="module")
def ours() -> JanusForConditionalGeneration:
    return fastigpt.accelerate(their_model())


@pytest.fixture(autouse=True)
def nothing_is_refused(recwarn: pytest.WarningsRecorder) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this call of generate has")
        yield


def ids(*words: int) -> torch.Tensor:
    return torch.tensor([[START_ID, 4, *words, IMAGE_ID]])


@pytest.mark.parametrize("scale", [5.0, 2.0, None])
@pytest.mark.parametrize("words", [(6, 7, 8), (9,)])
def test_greedy_tokens_are_transformers_own(ours, theirs, words, scale):
    given = ids(*words)
    how = {**IMAGE, "attention_mask": torch.ones_like(given), "do_sample": False, "guidance_scale": scale}
    expected = theirs.generate(given, **how)
    found = ours.generate(given, **how)
    assert torch.equal(found, expected) and found.dtype == given.dtype
    assert torch.equal(ours.decode_image_tokens(found), theirs.decode_image_tokens(expected))


def test_left_padded_prompts_are_those_of_each_alone(ours, theirs):
    longer, shorter = ids(6, 7, 8), ids(9)
    padded = torch.cat([longer, torch.cat([torch.full((1, 2), PAD_ID), shorter], 1)])
    mask = torch.ones_like(padded)
    mask[1, :2] = 0
    found = ours.generate(padded, attention_mask=mask, do_sample=False, **IMAGE)
    for row, given in zip(found, (longer, shorter)):
        assert torch.equal(row, ours.generate(given, do_sample=False, **IMAGE)[0])
    assert torch.equal(found, theirs.generate(padded, attention_mask=mask, do_sample=False, **IMAGE))


def test_sampling_is_fastigpts_own(ours):
    given, model = ids(6, 7), fastigpt.restore(copy.deepcopy(ours))
    drawn = ours.generate(given, do_sample=True, num_return_sequences=4, seed=3, **IMAGE)
    assert drawn.shape == (4, N) and len(drawn.unique(dim=0)) == 4
    alone = ours.generate(given, do_sample=True, seed=3, **IMAGE)
    assert torch.equal(drawn[:1], alone)  # theirs depends on the batch
    torch.manual_seed(5)
    first = ours.generate(given, do_sample=True, **IMAGE)
    torch.manual_seed(5)
    assert torch.equal(first, ours.generate(given, do_sample=True, **IMAGE))
    twin = torch.Generator().manual_seed(5)
    assert torch.equal(first, ours.generate(given, do_sample=True, generator=twin, **IMAGE))
    assert type(model) is JanusForConditionalGeneration


def test_no_filter_is_put_on_that_nobody_asked_for(ours, monkeypatch):
    """transformers' default of 50, which is meant for text, is more than there are codes here: so it is 1."""
    text = {"top_k": 1, "do_sample": False}
    monkeypatch.setattr(ours.generation_config, "_get_default_generation_params", lambda: text)
    given = ids(6, 7)
    free = ours.generate(given, do_sample=True, seed=1, **IMAGE)
    greedy = ours.generate(given, do_sample=False, **IMAGE)
    assert not torch.equal(free, greedy)
    assert torch.equal(ours.generate(given, do_sample=True, seed=1, top_k=1, **IMAGE), greedy)
    config = GenerationConfig(do_sample=True, top_k=1)
    assert torch.equal(ours.generate(given, generation_config=config, seed=1, **IMAGE), greedy)
    assert torch.equal(ours.generate(given, do_sample=True, seed=1, top_k=CODES, **IMAGE), free)
    assert torch.equal(ours.generate(given, do_sample=True, seed=1, temperature=1e-4, **IMAGE), greedy)


def test_any_guidance_scale_is_served(ours):
    given = ids(6, 7)
    found = [ours.generate(given, do_sample=False, guidance_scale=scale, **IMAGE) for scale in (0.0, 0.5, 1.0, 5.0)]
    assert len(torch.cat(found).unique(dim=0)) > 2
    nothing = torch.tensor([[START_ID, PAD_ID, PAD_ID, PAD_ID, IMAGE_ID]])
    assert torch.equal(found[0], ours.generate(nothing, do_sample=False, guidance_scale=1.0, **IMAGE))


def test_text_is_written_as_before(ours, theirs):
    given = ids(6, 7)
    how = {"attention_mask": torch.ones_like(given), "max_new_tokens": 3, "max_length": None, "do_sample": False}
    assert torch.equal(ours.generate(given, **how), theirs.generate(given, **how))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"logits_processor": [TemperatureLogitsWarper(2.0)]}, "logits_processor"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"do_sample": True, "min_p": 0.1}, "MinPLogitsWarper"),
    ],
)
def test_what_is_not_served_runs_the_original(ours, theirs, how, named):
    given = ids(6, 7)
    how = {**IMAGE, **how, "attention_mask": torch.ones_like(given)}
    own = list(how.get("logits_processor", ()))  # their loop adds to the list that it is given

    def fresh() -> dict[str, Any]:
        return {**how, "logits_processor": LogitsProcessorList(own)} if own else how

    warnings.filterwarnings("always", message="this call of generate has")
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"this call of generate has {named}"):
        found = ours.generate(given, **fresh())
    torch.manual_seed(0)
    expected = theirs.generate(given, **fresh())
    assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))
    with pytest.raises(ValueError, match=f"seed was given, but fastigpt cannot serve this call: it has {named}"):
        ours.generate(given, seed=1, **fresh())


@pytest.mark.parametrize(
    ("given", "how", "told"),
    [
        (torch.tensor([[START_ID, 64, IMAGE_ID]]), {}, "inputs must hold ids of 0 to 63, found 1 to 64"),
        (ids(6), {"attention_mask": torch.ones(1, 2)}, "attention_mask has the shape"),
        (ids(6), {"attention_mask": torch.zeros(1, 4)}, "at least one id"),
        (ids(6), {"guidance_scale": -1.0}, "guidance_scale must be"),
        (ids(6), {"nonsense": 3}, "nonsense"),
        (ids(6), {"seed": 1, "generator": torch.Generator()}, "seed or generator"),
    ],
)
def test_what_is_impossible_is_refused_by_name(ours, given, how, told):
    with pytest.raises(ValueError, match=told):
        ours.generate(given, **{**IMAGE, **how})


def test_copies_stay_accelerated_and_restore_undoes_it(ours):
    given = ids(6, 7)
    expected = ours.generate(given, do_sample=True, seed=3, **IMAGE)
    twin = pickle.loads(pickle.dumps(ours))
    assert torch.equal(twin.generate(given, do_sample=True, seed=3, **IMAGE), expected)
    assert isinstance(twin, JanusForConditionalGeneration) and type(twin).__name__ == "JanusForConditionalGeneration"
    with torch.no_grad():
        twin.model.generation_head.vision_head.weight.mul_(-1)
    assert not torch.equal(twin.generate(given, do_sample=True, seed=3, **IMAGE), expected)
    fastigpt.restore(twin)
    with pytest.raises(ValueError, match="seed"):
        twin.generate(given, attention_mask=torch.ones_like(given), seed=3, **IMAGE)


def test_an_adapted_one_is_refused():
    model = their_model()
    model.model.language_model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"layers\.0\.extra.*adapted"):
        fastigpt.accelerate(model)
