"""What may be said of a draw and of a model that is loaded, named once for all functions, and checked in one place.

The TypedDicts are the public keywords with their meaning; `Options` is what they are after the check.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypedDict

import torch

from fastigpt.arguments import window_size
from fastigpt.sampling import Drawing, checked_drawing, fresh_seed
from fastigpt.scalars import integer, whole
from fastigpt.spec import ModelSpec

LAST_INDEX = 2**63 - 1
"""Image indices of the noise contract are 0 to this."""


class LoadOptions(TypedDict, total=False):
    """Where and in what a model computes."""

    device: Annotated[torch.device | str | None, '"cpu", "cuda", "cuda:1", …; None: CUDA if there is one.']
    dtype: Annotated[torch.dtype | str | None, "Of the weights; None: what the backend does best."]
    kv_dtype: Annotated[torch.dtype | str | None, "Of the key-value cache; None: what the backend does best."]
    backend: Annotated[str, '"auto", or one that `fastigpt info` lists; one that cannot run here is refused.']


class ModelOptions(LoadOptions, total=False):
    """Of a model that is made from weights at hand."""

    name: Annotated[str, "What the model is called in messages and in what it draws."]


class DrawOptions(TypedDict, total=False):
    """How tokens are drawn. The last three change the time it takes and never the result."""

    prompt: Annotated[str | Sequence[str] | None, "One for all images or one for each, for models that read text."]
    label: Annotated[
        int | str | Sequence[int | str] | None,
        "Number or name of a class, one for all images or one for each, for models of classes.",
    ]
    negative_prompt: Annotated[
        str | Sequence[str] | None,
        "What guidance leads away from, one for all images or one for each; needs guidance. None: no prompt.",
    ]
    guidance_scale: Annotated[
        float | None,
        "How strongly to follow the prompt or label, ≥ 0: logits u + s·(c − u), c with it, u with the negative one. "
        "None: the model's default, if it has one and there is something to follow; 1 turns that off.",
    ]
    seed: Annotated[
        int | None,
        "0 … 2⁶⁴ − 1. Image k of a job is always the same picture: sample(1, seed=s, first_index=k). None draws a "
        'seed; it is in image.info["seed"] of PIL images and in the stats.',
    ]
    first_index: Annotated[int, "Number of the first image of the job, 0 … 2⁶³ − 1."]
    temperature: Annotated[
        float | None,
        "Divides the logits, ≥ 0; 0 takes the likeliest token. None: the model's default, if it has one, else 1.",
    ]
    top_k: Annotated[
        int | None,
        "Draw among the k likeliest tokens, ≥ 1; as in transformers, after the temperature. None: the model's default, "
        "if it has one; as many as there are tokens, or more, turn that off.",
    ]
    top_p: Annotated[
        float | None,
        "Draw among the likeliest tokens that make up this probability, in (0, 1]; after top_k. None: the model's "
        "default, if it has one; 1 turns that off.",
    ]
    batch_size: Annotated[int | None, "Images at a time; None: what fits the memory that is free."]
    window: Annotated[int | str, 'Tokens per pass (fixed-point sampling), or "auto".']
    draft: Annotated[
        Any, "A smaller model with the same palette that guesses the windows: an ImageGPT, a directory or a hub id."
    ]


class JobOptions(DrawOptions, total=False):
    """Of calls that return when all is drawn."""

    progress: Annotated[
        bool | None, "A bar that counts images; None: if a person is watching (a terminal, a notebook)."
    ]


class CompleteOptions(JobOptions, total=False):
    """What to keep of the images, and how."""

    rows: Annotated[int | None, "Keep this many rows of tokens from the top and draw the others anew."]
    mask: Annotated[
        Any,
        "bool, True = draw anew, or a picture, white = draw anew: [H, W] or [n_images, H, W], or a list of one for "
        "each image, at the size of the canvas or of the images, upright. Without rows and mask the "
        "transparent parts of the images are drawn anew.",
    ]
    particles: Annotated[
        int,
        "Candidates per result. 1 draws each unknown cell from what is before it; more are resampled by how well they "
        "predict the known cells after the hole (see particles.py), and take as many times longer and more. Where "
        "nothing known follows the unknown cells they change nothing.",
    ]


class SampleAnyOptions(JobOptions, LoadOptions, total=False):
    """Of `fastigpt.sample`: draws, and loads the model if it is not loaded yet."""


class CompleteAnyOptions(CompleteOptions, LoadOptions, total=False):
    """Of `fastigpt.complete`: draws, and loads the model if it is not loaded yet."""


DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"first_index": 0, "window": "auto", "particles": 1, "backend": "auto", "name": ""}
)
"""Of the options; those not named here default to None."""


@dataclass(frozen=True)
class Options:
    """Drawing options that were checked. draft, prompt, negative_prompt: as they were given; the model knows what they
    mean. label: as words."""

    drawing: Drawing
    first_index: int
    window: int | Literal["auto"]
    batch_size: int | None
    prompt: str | Sequence[str] | None
    label: str | Sequence[str] | None
    negative_prompt: str | Sequence[str] | None
    draft: Any


def checked(
    given: Mapping[str, Any], count: int, spec: ModelSpec, defaults: Mapping[str, Any] = MappingProxyType({})
) -> Options:
    """The options of a job of `count` images. defaults: the model's, of guidance_scale, temperature, top_k, top_p.
    Raises TypeError or ValueError naming the option, what was given and what is allowed."""
    option = {**DEFAULTS, **given}
    seed, prompt, label = option.get("seed"), option.get("prompt"), option.get("label")
    negative, batch_size = option.get("negative_prompt"), option.get("batch_size")
    for name in ("temperature", "top_k", "top_p"):
        if option.get(name) is None:
            option[name] = defaults.get(name)
    guidance = option.get("guidance_scale")
    follows = not (prompt is None and label is None and negative is None)
    if guidance is None and follows:
        guidance = defaults.get("guidance_scale")
    drawing = checked_drawing(
        fresh_seed() if seed is None else seed,
        1.0 if option["temperature"] is None else option["temperature"],
        option["top_k"],
        option["top_p"],
        guidance,
    )
    if label is not None and prompt is not None:
        raise ValueError("give prompt or label, not both")
    if guidance is not None and not follows:
        raise ValueError("guidance_scale was given without a prompt to follow")
    if negative is not None and guidance is None:
        raise ValueError("negative_prompt was given without guidance_scale: it is what guidance leads away from")
    if drawing.guidance_scale == 1 and "guidance_scale" in defaults:
        # u + 1·(c − u) is c but for its rounding, and costs twice as much. A model without a default is guided where it
        # is asked to be: what it drew at 1 before is what it draws.
        drawing, negative = replace(drawing, guidance_scale=None), None
    if drawing.top_k is not None:  # more than there are forbid nothing
        drawing = replace(drawing, top_k=min(drawing.top_k, spec.n_tokens))
    return Options(
        drawing=drawing,
        first_index=whole("first_index", option["first_index"], 0, LAST_INDEX - count + 1),
        window=window_size(option["window"], spec.n_positions),
        batch_size=None if batch_size is None else whole("batch_size", batch_size, 1),
        prompt=prompt,
        label=_labels(label),
        negative_prompt=negative,
        draft=option.get("draft"),
    )


def _labels(label: Any) -> str | list[str] | None:
    """Numbers and names of classes as the words that a model of classes reads."""
    if label is None:
        return None
    if isinstance(label, (list, tuple)) or getattr(label, "ndim", 0) > 0:
        return [each if isinstance(each, str) else str(integer("label", each, "an int or a name")) for each in label]
    return label if isinstance(label, str) else str(integer("label", label, "an int, a name, or a sequence of those"))


def load_options(options: Mapping[str, Any]) -> tuple[LoadOptions, dict[str, Any]]:
    """The options that are LoadOptions, and the others."""
    load: Any = {name: value for name, value in options.items() if name in LoadOptions.__annotations__}
    return load, {name: value for name, value in options.items() if name not in load}


def model_options(options: Mapping[str, Any]) -> tuple[str, LoadOptions]:
    """The name of a model, and how it computes."""
    load, _ = load_options(options)
    return options.get("name", DEFAULTS["name"]), load
