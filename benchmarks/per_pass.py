"""Seconds per pass of loops that draw whole images, without drawing one: the difference between runs that end after a
few passes and after some more, so that neither a prompt nor what a call sets up counts. Peers take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastigpt.bench.floor import Floor, pass_floor
from fastigpt.bench.machine import measure_machine
from fastigpt.bench.models import made_up
from fastigpt.bench.peers import EnginePeer, LlamaPeer
from fastigpt.bench.timing import timed
from fastigpt.engine import Engine, loop
from fastigpt.engine.choose import build
from fastigpt.job import Request
from fastigpt.sampling import Drawing
from fastigpt.spec import ModelSpec

FEW, MANY = 4, 12
Passes = Callable[[int], object]
"""Draws that many tokens of every image."""


@dataclass(frozen=True)
class Figures:
    """seconds of a pass in each round; floor: of the same precision."""

    seconds: list[float]
    floor: Floor

    def __str__(self) -> str:
        middle = statistics.median(self.seconds)
        low, high = min(self.seconds), max(self.seconds)
        return (
            f"{1e3 * middle:.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f}), {self.floor.seconds / middle:.0%} of floor"
        )


def guided_pass(who: str, spec: ModelSpec, device: torch.device, sequences: int) -> Callable[[], object]:
    """One pass of so many sequences in the middle of their canvases, made-up weights in bfloat16. who: "fastigpt", or
    "transformers" for its LlamaModel."""
    if who == "fastigpt":
        peer = EnginePeer(build(spec, made_up(spec), device=device, dtype="bfloat16"))
        return peer.prepared_pass(n=sequences, position=spec.n_positions // 2)
    other = LlamaPeer(spec, device, torch.bfloat16, guided=True)
    return other.prepared_pass(n=sequences, position=spec.n_positions // 2)


def measured(
    peers: Mapping[str, tuple[Passes, torch.dtype]], spec: ModelSpec, rows: int, device: torch.device, rounds: int,
    many: int = MANY,
) -> dict[str, Figures]:  # fmt: skip
    """peers: what draws, and in which dtype. rows: sequences, both branches of guided images. many: tokens of longer
    runs: the shorter a pass, the more."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for run, _ in peers.values():
        run(1)
    for _ in range(rounds):
        for name, (run, _) in peers.items():
            run(1)  # whoever comes after another gets its memory anew, which is no part of a pass
            short, long = (timed(lambda run=run, count=count: run(count), device)[1] for count in (FEW, many))
            seconds[name].append((long - short) / (many - FEW))
    machine = measure_machine(device)
    print(f"{machine.name}, {machine.threads} threads, reads {machine.bandwidth / 1e9:.1f} GB/s")
    at = len(spec.unconditional) + (FEW + many) / 2
    limits = {"bandwidth": machine.bandwidth, "gemm": machine.gemm["bfloat16"]}
    return {
        name: Figures(
            seconds[name], pass_floor(spec, n=rows, position=at, window=1, dtype=dtype, kv_dtype=dtype, **limits)
        )
        for name, (_, dtype) in peers.items()
    }


def ours(engine: Engine, n: int, scale: float, prefix: tuple[int, ...], **filters: int) -> Passes:
    """n guided images of one prompt."""
    spec = engine.spec
    empty = torch.full((spec.n_positions,), -1, dtype=torch.int64, device="cpu")

    def run(count: int) -> object:
        drawing = Drawing(seed=0, guidance_scale=scale, **filters)
        requests = [Request(empty, k, drawing, prefix, spec.unconditional, stop=count) for k in range(n)]
        return loop.run(engine, requests, batch_size=n, window=1)

    return run
