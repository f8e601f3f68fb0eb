"""`fastigpt bench`: one run, one table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
from rich.console import Console

from fastigpt.bench.floor import kv_bytes_per_token
from fastigpt.bench.measure import measure, timed_positions
from fastigpt.bench.peers import EnginePeer, Peer, TransformersPeer
from fastigpt.bench.report import as_json, machine_line, plot_throughput, table, write_json
from fastigpt.engine.choose import as_device, build
from fastigpt.engine.memory import free_memory
from fastigpt.families import image_gpt
from fastigpt.families.image_gpt.config import PRESETS, ImageGPTConfig
from fastigpt.model import ImageGPT
from fastigpt.options import LoadOptions
from fastigpt.scalars import whole

WINDOW_IMAGES = 8  # are drawn to see how many tokens of a window are right


def bench(
    model: str,
    counts: Sequence[int],
    *,
    backend: str = "auto",
    dtypes: Sequence[str | None] = (None,),
    kv_dtypes: Sequence[str] | None = None,
    device: str | None = None,
    window: int = 1,
    peers: bool = True,
    rounds: int = 3,
    plot: Path | None = None,
    json: Path | None = None,
) -> None:
    """Measures and prints. model: a preset (random weights), a directory or a hub id. dtypes, kv_dtypes: an engine of
    ours for each pair. peers: also transformers, where it is installed, and the portable engine, with a window of one.

    window: tokens that our passes score. How many of them a pass decides is measured by drawing WINDOW_IMAGES images;
    random weights say nothing about that, so presets get milliseconds per pass and no images per minute."""
    for count in counts:
        whole("n", count, 1)
    if kv_dtypes is not None and len(kv_dtypes) != len(dtypes):
        raise ValueError(f"--kv-dtype has {len(kv_dtypes)} entries for {len(dtypes)} of --dtype")
    if plot is not None and window > 1 and model in PRESETS:
        raise ValueError("--plot draws images per minute; with --window that takes a trained model, not a preset")
    place = as_device(device)
    loaded = _load(model)
    config = loaded.config
    spec, weights = image_gpt.spec(config), image_gpt.canonical(config, loaded.weights)
    whole("window", window, 1, max(1, config.n_pixels - timed_positions(config)[-1]))
    room = free_memory(place)
    for count in counts:
        cache = count * config.n_pixels * kv_bytes_per_token(config, torch.int8)  # of the smallest that there is
        if cache > room:
            raise ValueError(f"n={count} needs a cache of {cache / 1e9:,.0f} GB or more; {room / 1e9:,.1f} GB are free")
    measured: list[Peer] = [
        _ours(loaded, window, model not in PRESETS, backend=backend, device=place, dtype=dtype, kv_dtype=kv_dtype)
        for dtype, kv_dtype in zip(dtypes, [None] * len(dtypes) if kv_dtypes is None else kv_dtypes)
    ]
    if peers:
        if all(peer.name != "fastigpt portable" for peer in measured):
            measured.append(EnginePeer(build(spec, weights, backend="portable", device=place, dtype="bfloat16")))
        missing = TransformersPeer.why_unavailable()
        if missing is None:
            measured.append(TransformersPeer(config, place, torch.bfloat16))
        else:
            Console(stderr=True).print(f"not measured: {missing}")
    machine, timings = measure(config, measured, counts, device=place, rounds=rounds)
    # A pipe has no width to fit: let the table be as wide as it is.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(machine_line(machine), soft_wrap=True)
    console.print(f"{model}: {config.n_layer} layers × {config.n_embd}, window {window}", soft_wrap=True)
    if window > 1 and model in PRESETS:
        console.print("random weights: how many tokens of a window are right is not known, nor images per minute")
    console.print(table(sorted(timings, key=lambda t: t.n), "transformers" if peers else measured[0].name))
    if json is not None:
        write_json(json, as_json(config, machine, timings))
    if plot is not None:
        plot_throughput(plot, timings)


def _ours(model: ImageGPT, window: int, trained: bool, **options: Unpack[LoadOptions]) -> EnginePeer:
    """An engine with this model's weights; with windows of a trained model, their acceptance is measured."""
    ours = ImageGPT(model.config, model.weights, vocabulary=model.vocabulary, **options)
    if window == 1 or not trained:
        return EnginePeer(ours.engine, window)
    _, stats = ours.sample(WINDOW_IMAGES, seed=0, window=window, output_type="tokens", return_stats=True)
    return EnginePeer(ours.engine, window, stats.tokens_per_pass)


def _load(model: str) -> ImageGPT:
    """Held by the reference engine, which keeps the weights as they are."""
    if model in PRESETS:
        return ImageGPT.from_config(ImageGPTConfig.preset(model), backend="reference", device="cpu")
    return ImageGPT.from_pretrained(model, backend="reference", device="cpu")
