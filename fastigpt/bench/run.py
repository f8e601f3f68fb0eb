"""`fastigpt bench`: one run, one table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from fastigpt.bench.floor import kv_bytes_per_token, parameters
from fastigpt.bench.measure import measure, timed_positions
from fastigpt.bench.models import SHAPES, Measured, find
from fastigpt.bench.peers import EnginePeer, LlamaPeer, Peer, TransformersPeer
from fastigpt.bench.report import as_json, machine_line, plot_throughput, table, write_json
from fastigpt.engine.choose import as_device, as_dtype, build
from fastigpt.engine.memory import free_memory
from fastigpt.families.image_gpt.config import PRESETS, ImageGPTConfig
from fastigpt.model import Model
from fastigpt.options import LoadOptions
from fastigpt.scalars import whole
from fastigpt.spec import ModelSpec

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
    if plot is not None and window > 1 and (model in PRESETS or model in SHAPES):
        raise ValueError("--plot draws images per minute; with --window that takes a trained model, not a preset")
    place = as_device(device)
    found = _load(model)
    spec, trained = found.spec, found.pretrained is not None
    whole("window", window, 1, max(1, spec.n_positions - timed_positions(spec)[-1]))
    measured: list[Peer] = []
    missing = TransformersPeer.why_unavailable()
    caches: Sequence[str | None] = [None] * len(dtypes) if kv_dtypes is None else kv_dtypes
    wanted = [(backend, dtype, cache) for dtype, cache in zip(dtypes, caches)]
    held = [*dtypes, *(["bfloat16"] * 2 if peers else [])]
    _check_room(model, spec, held, max(counts) * found.branches, place)
    for each in wanted:
        measured.append(_ours(found, window, *each, place))
    if peers:
        if all(peer.name != "fastigpt portable" for peer in measured):
            measured.append(_ours(found, 1, "portable", "bfloat16", None, place))
        if missing is None:
            measured.append(_theirs(found, place))
        else:
            Console(stderr=True).print(f"not measured: {missing}")
    machine, timings = measure(spec, measured, counts, device=place, rounds=rounds, branches=found.branches)
    # A pipe has no width to fit: let the table be as wide as it is.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(machine_line(machine), soft_wrap=True)
    guided = ", guided: two sequences an image" if found.branches == 2 else ""
    console.print(f"{model}: {spec.n_layer} layers × {spec.width}, window {window}{guided}", soft_wrap=True)
    if window > 1 and not trained:
        console.print("random weights: how many tokens of a window are right is not known, nor images per minute")
    console.print(table(sorted(timings, key=lambda t: t.n), "transformers" if peers else measured[0].name))
    if json is not None:
        write_json(json, as_json(found.config, machine, timings))
    if plot is not None:
        plot_throughput(plot, timings)


def _check_room(model: str, spec: ModelSpec, dtypes: Sequence[str | None], rows: int, place: torch.device) -> None:
    """Raises ValueError where the weights of all that is measured, and their caches, do not fit the free memory. rows:
    sequences side by side."""
    room = free_memory(place)
    cache = rows * spec.context * kv_bytes_per_token(spec, torch.int8)  # of the smallest that there is
    if cache > room:
        raise ValueError(f"n={rows} needs a cache of {cache / 1e9:,.0f} GB or more; {room / 1e9:,.1f} GB are free")
    sizes = [(as_dtype(dtype) or torch.bfloat16).itemsize for dtype in dtypes]
    weights = parameters(spec) * sum(sizes)
    if weights + cache > room:
        raise ValueError(
            f"{model} needs {weights / 1e9:,.1f} GB for the weights of all {len(dtypes)} that are measured; "
            f"{room / 1e9:,.1f} GB are free"
            + ("" if len(dtypes) == 1 else ". With --no-peers and one --dtype it is one of them")
        )


def _ours(
    found: Measured, window: int, backend: str, dtype: str | None, kv_dtype: str | None, device: torch.device
) -> EnginePeer:
    """An engine with these weights; with windows of a trained model, their acceptance is measured."""
    how: LoadOptions = {"backend": backend, "dtype": dtype, "kv_dtype": kv_dtype, "device": device}
    if window == 1 or found.pretrained is None:
        return EnginePeer(build(found.spec, found.weights, **how), window)
    ours = Model(found.pretrained, **how)
    _, stats = ours.sample(WINDOW_IMAGES, seed=0, window=window, output_type="tokens", return_stats=True)
    return EnginePeer(ours.engine, window, stats.tokens_per_pass)


def _theirs(found: Measured, device: torch.device) -> Peer:
    if isinstance(found.config, ImageGPTConfig):
        return TransformersPeer(found.config, device, torch.bfloat16)
    return LlamaPeer(found.spec, device, torch.bfloat16, guided=found.branches == 2)


def _load(model: str) -> Measured:
    return find(model)
