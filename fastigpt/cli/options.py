"""The options that commands share, named once: a TypedDict each, whose fields are typer's options."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict

import typer

from fastigpt.signatures import expand

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Directory, hub id or scenes-128. Default: the bundled scenes.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: CUDA if there is one.")]
Backend = Annotated[str, typer.Option(help="auto, or one that `fastigpt info` lists.")]
Dtype = Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16, … Default: the backend's best.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]


class DrawingOptions(TypedDict):
    """What sample and complete take alike."""

    model: Model
    prompt: Annotated[str | None, typer.Option(help="What to draw, for models that read text.")]
    label: Annotated[str | None, typer.Option(help="Number or name of the class to draw, for models of classes.")]
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to lead away from; needs guidance. Default: no prompt.")
    ]
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="How strongly to follow the prompt: u + s·(c − u). 1: not. Default: the model's."),
    ]
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same images. Default: a new one.")]
    first_index: Annotated[int, typer.Option(help="Number of the first image: the job goes on from there.")]
    temperature: Annotated[
        float | None,
        typer.Option(help="Divides the logits; 0 takes the likeliest token. Default: the model's, or 1."),
    ]
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens. Default: the model's.")]
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens that make up this probability.")]
    device: Device
    backend: Backend
    dtype: Dtype
    kv_dtype: Annotated[str | None, typer.Option(help="Of the key-value cache.")]
    batch_size: Annotated[int | None, typer.Option(help="Images at a time. Default: what fits memory and is of use.")]
    window: Annotated[str, typer.Option(help="Tokens per pass (fixed-point sampling): auto, 1, 2, … Same images.")]
    draft: Annotated[
        str | None, typer.Option(help="A smaller model, same palette, that guesses the windows. Same images.")
    ]
    scale: Annotated[int, typer.Option(min=1, max=64, help="Each pixel becomes this many, squared, in a grid.")]
    c2pa: Annotated[
        bool, typer.Option("--c2pa", help="Sign where pictures come from: model, seed, index; not the prompt.")
    ]
    c2pa_cert: Annotated[Path | None, typer.Option(help="Certificate (.pem) to sign with. Default: one of your own.")]
    c2pa_key: Annotated[Path | None, typer.Option(help="Private key (.pem) of --c2pa-cert.")]
    as_json: AsJson


DEFAULTS = {
    "first_index": 0,
    "backend": "auto",
    "window": "auto",
    "scale": 4,
    "c2pa": False,
    "as_json": False,
}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, the fields of its `**options: Unpack[…]` as options of their own."""
    command.__signature__ = expand(command, DEFAULTS)[0]  # type: ignore[attr-defined]
    command.__annotations__ = {
        p.name: p.annotation for p in inspect.signature(command).parameters.values() if p.name != "return"
    }
    return command


def window_size(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def split(options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that say how to load a model and how to draw from it, as the library takes them."""
    load = {name: options[name] for name in ("device", "backend", "dtype", "kv_dtype")}
    names = (
        "prompt",
        "label",
        "negative_prompt",
        "guidance_scale",
        "temperature",
        "top_k",
        "top_p",
        "batch_size",
        "draft",
    )
    draw = {name: options[name] for name in names}
    return load, {**draw, "window": window_size(options["window"])}


def given(option: str, path: str) -> str:
    """A path that is not empty."""
    if not path.strip():
        raise ValueError(f"{option} is empty: name a file or a folder")
    return path
