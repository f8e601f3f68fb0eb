"""The methods of a model and the readers of prompts, given arguments that nobody should hand over: a result of the
promised kind, or a ValueError or TypeError."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from harness import Case, survive
from hostile import NUMBERS, OTHERS, tensor, value
from PIL import Image

from fastigpt import ImageGPT, ImageGPTConfig, Palette
from fastigpt.prompts import Vocabulary

CONFIG = ImageGPTConfig(n_layer=1, n_head=1, n_embd=8, height=3, width=3, n_colors=5, n_words=4, prompt_length=2)
WORDS = Vocabulary(("", "red", "green", "house"), 2)
PIXELS = CONFIG.n_pixels
# Whole numbers from here to 2⁶³ ask for more than a test has time for, and are not wrong.
MANY = 50
COUNTS = ("n", "tokens_or_n", "particles", "num_return_sequences", "max_new_tokens")


@functools.cache
def model(backend: str) -> ImageGPT:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in CONFIG.tensor_shapes().items()}
    palette = Palette(np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3))
    return ImageGPT(CONFIG, weights, palette=palette, vocabulary=WORDS, backend=backend, device="cpu")


def tokens(case: Case) -> torch.Tensor:
    return torch.tensor([[case.randrange(5) for _ in range(PIXELS)] for _ in range(2)])


def canvas(case: Case) -> torch.Tensor:
    known = tokens(case)
    known[0, 4:] = -1
    return known


def picture(case: Case) -> Image.Image:
    return Image.new("RGB", (case.choice([3, 9]), case.choice([3, 7])), (case.randrange(256), 5, 200))


def drawing(case: Case) -> dict[str, Any]:
    return {
        "prompt": case.choice([None, "red", "green house"]),
        "label": None,
        "negative_prompt": None,
        "guidance_scale": None,
        "seed": case.choice([None, 0, 7]),
        "first_index": case.randrange(5),
        "temperature": case.choice([0.0, 0.7, 1.0]),
        "top_k": case.choice([None, 3]),
        "top_p": case.choice([None, 0.8]),
        "batch_size": case.choice([None, 2]),
        "window": case.choice(["auto", 1, 4]),
        "draft": None,
    }


def calls(case: Case) -> tuple[str, dict[str, Any]]:
    """A method and arguments that are right."""
    shown = {"progress": False, "return_stats": case.random() < 0.5}
    output = {"output_type": case.choice(["pil", "np", "pt", "tokens"])}
    start = torch.full((2, 1), CONFIG.start_token)
    generate = {
        name: x
        for name, x in drawing(case).items()
        if name not in ("prompt", "label", "negative_prompt", "guidance_scale", "first_index")
    }
    return case.choice(
        [
            ("sample", {"n": 3, **drawing(case), **output, **shown}),
            ("complete", {"images": [picture(case)], "n": 2, "rows": 1, "mask": None, "particles": 1, **drawing(case),
                          **output, **shown}),
            ("fill", {"tokens": canvas(case), **drawing(case), **shown}),
            ("stream", {"tokens_or_n": case.choice([2, canvas(case)]), **drawing(case)}),
            ("generate", {"input_ids": start, "max_length": 10, "max_new_tokens": None, "do_sample": True,
                          "num_return_sequences": 2, "generator": None, **generate}),
            ("encode", {"images": [picture(case)]}),
            ("decode", {"tokens": tokens(case)}),
            ("logits", {"tokens": tokens(case), "prompt": None}),
            ("nll", {"tokens": tokens(case), "prompt": "red"}),
            ("features", {"images_or_tokens": tokens(case), "layer": 1, "pool": "mean", "prompt": None}),
        ]
    )  # fmt: skip


def hostile(case: Case, name: str, given: Any) -> Any:
    if name == "prompt" and case.random() < 0.5:
        return text(case)
    if isinstance(given, torch.Tensor) and case.random() < 0.8:
        return tensor(case, given)
    while True:
        chosen = value(case)
        try:
            asks = name in COUNTS and MANY < int(chosen) < 2**63
        except Exception:  # no number
            asks = False
        if not asks:
            return chosen


def method(case: Case) -> None:
    backend, (name, arguments) = case.choice(["portable", "reference", "cpu"]), calls(case)
    for argument in case.sample(sorted(arguments), min(len(arguments), case.choice([1, 1, 2]))):
        arguments[argument] = hostile(case, argument, arguments[argument])
    case.say((backend, name, arguments))
    found = getattr(model(backend), name)(**arguments)
    if name == "stream":
        found = torch.cat([row.flatten() for _, _, row in found])
    elif name in ("sample", "complete") and arguments["output_type"] != "tokens":
        return
    elif isinstance(found, tuple):
        found = found[0]
    if name in ("sample", "complete", "fill", "stream", "encode"):
        found = torch.as_tensor(found)
        assert bool(((found >= 0) & (found < CONFIG.n_colors)).all()), found
    elif name in ("logits", "nll"):
        assert bool(torch.isfinite(found).all()), found


WORDLIKE = ["red", "green", "house", "Red!", "rot", "", " ", "\n", "\0", "\ud800", "é", "ʼn", "ß", "İ", "🏠", "'",
            "red's", "a" * 10_000, "red " * 300, "x" * 100 + "y", "١٢", "%s", "{}", "\u202ered", "ﬁ"]  # fmt: skip


def text(case: Case) -> Any:
    words = " ".join(case.choice(WORDLIKE) for _ in range(case.choice([1, 1, 2, 3])))
    return case.choice([words, [words], [words, "red"], (words, None), [[words]], words.encode("utf-8", "replace"),
                        {words: 1}, np.array([words]), iter([words, "red"])])  # fmt: skip


def prompt(case: Case) -> None:
    asked = case.say(text(case))
    found = model("portable").logits(tokens(case), prompt=asked)
    assert found.shape == (2, PIXELS, 5)


def vocabulary(case: Case) -> None:
    def any_value() -> Any:
        lists = [WORDLIKE, ["", "red"], ["", "red", "red"], [1, 2], [""], [], ["", None], [[]], ["", "a b"]]
        return case.choice([case.choice(lists), case.choice(NUMBERS), case.choice(OTHERS)])

    arguments = {"words": ["", "red", "green"], "max_words": 2, "examples": ["red"]}
    for name in case.sample(sorted(arguments), case.randint(0, 2)):
        arguments[name] = any_value()
    made = Vocabulary(**case.say(arguments))
    ids = made.encode(case.choice(["red", case.choice(WORDLIKE)]))
    assert len(ids) == made.max_words and made.decode(ids)


@pytest.mark.parametrize("kind", [method, prompt, vocabulary], ids=lambda kind: kind.__name__)
def test_arguments_are_understood_or_refused(kind):
    survive(kind, cases={method: 600}.get(kind, 300))
