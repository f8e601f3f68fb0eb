"""Chooses launch configurations by measurement and writes fastigpt/kernels/configs/<family>.json.

    python -m benchmarks.tune [--out FILE] [--seconds N]

Candidates are timed by replaying CUDA graphs on cold caches, and only those whose results are those of the kernel's
plain twin: a fast wrong one never wins. What the time does not suffice for keeps its row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import bench_causal_attention
import bench_decode_attention
import bench_norm_linear
from triton.runtime.errors import OutOfResources, PTXASError
from twins import difference

from fastigpt.bench.timing import graph_seconds, repeat
from fastigpt.engine import loop
from fastigpt.engine.triton import TritonEngine
from fastigpt.families import image_gpt
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.job import Request
from fastigpt.kernels import launch
from fastigpt.sampling import Drawing

ROWS = (1, 16, 32, 64)  # of the rows of "norm_linear", in its order
CROSSING = (16, 32, 64, 128, 256, 512)  # rows at which the kernel is compared with cuBLAS
WIDTH = 512
IMAGES = (1, 8, 64)  # of the rows of "decode_attention", in its order
HEADS = ((8, 64), (16, 96))  # one row serves all head dims: small's and large's
SEQUENCES = (16, 1024, 8)  # batch, length and heads of causal attention
STEP = 64  # positions that are drawn to compare launches that overlap with those that do not
MOST: int | None = None  # candidates for a row; a dry run tries fewer
TOLERANCE = 2e-2  # of the largest result: kernels and twins round at different places, to bfloat16

Row = dict[str, Any]
Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Choice:
    """A row of a table to be chosen by measurement. calls: for a candidate, lists of calls that cycle through cold
    inputs; their times are added. Each call is a partial of the kernel's launcher."""

    kernel: str
    row: int
    candidates: list[Row]
    calls: Callable[[Row], list[Calls]]


def choices(table: launch.Table) -> Iterator[Choice]:
    """Every row that is tuned, on the shapes of the small preset unless it says otherwise."""
    for i, rows in enumerate(ROWS):

        def linear(candidate: Row, rows: int = rows) -> list[Calls]:
            return [bench_norm_linear.one(layer, WIDTH, rows, table, candidate)[0] for layer in ("fc", "out")]

        yield Choice("norm_linear", i, linear_candidates(rows), linear)
    for kernel, window in (("decode_attention_1", 1), ("decode_attention", 8)):
        for i, (splits, n) in enumerate(zip(((8, 16), (2, 4), (1, 2)), IMAGES)):

            def decode(candidate: Row, n: int = n, window: int = window) -> list[Calls]:
                return [bench_decode_attention.one(n, *s, window, torch.bfloat16, table, candidate)[0] for s in HEADS]

            candidates = [{"block_s": block, "splits": split, "stages": stages, "warps": 4}
                          for split in splits for block, stages in ((64, 1), (64, 3), (128, 2))]  # fmt: skip
            yield Choice(kernel, i, candidates, decode)
    for i, head_dim in enumerate((64, 128)):

        def causal(candidate: Row, head_dim: int = head_dim) -> list[Calls]:
            return [[bench_causal_attention.one(*SEQUENCES, head_dim, table, candidate)[0]]]

        sizes = ((64, 64, 3, 4), (128, 64, 2, 4), (128, 64, 3, 8), (128, 128, 2, 8))
        names = ("block_m", "block_n", "stages", "warps")
        yield Choice("causal_attention", i, [dict(zip(names, size)) for size in sizes], causal)


def linear_candidates(rows: int) -> list[Row]:
    names = ("block_m", "block_n", "block_k", "stages", "warps")
    if rows == 1:
        sizes = ((1, 2, 512, 2, 2), (1, 4, 512, 1, 4), (1, 4, 512, 2, 4), (1, 8, 512, 1, 4), (1, 4, 1024, 1, 4))
    else:
        m = max(16, rows)
        sizes = ((m, 16, 128, 3, 4), (m, 32, 64, 4, 4), (m, 32, 128, 3, 4), (16, 16, 128, 4, 4), (16, 32, 128, 4, 4))
    return [dict(zip(names, size)) for size in sizes]


def rehearse(share: int, shares: int) -> None:
    """Compiles every `shares`-th candidate, so that `tune` finds it on disk: several processes take a share each."""
    table = launch.table(launch.family(torch.device("cuda")))
    work = [(choice, candidate) for choice in choices(table) for candidate in choice.candidates[:MOST]]
    for choice, candidate in work[share::shares]:
        try:
            for calls in choice.calls(candidate):
                calls[0]()
        except (OutOfResources, PTXASError) as error:
            print(f"{choice.kernel} {candidate}: {error}", flush=True)
    torch.cuda.synchronize()


def best(choice: Choice, deadline: float) -> Row | None:
    """The fastest candidate whose results are the twin's; None if there was no time for one. Those that cannot be
    launched drop out."""
    found: tuple[float, Row] | None = None
    for candidate in choice.candidates[:MOST]:
        if time.monotonic() > deadline:
            break
        try:
            work = choice.calls(candidate)
            wrong = max(difference(calls[0]) for calls in work)
            if not wrong <= TOLERANCE:  # nor may it be NaN
                print(f"  {candidate}: WRONG by {wrong:.3g} of the largest result", flush=True)
                continue
            spent = sum(graph_seconds(calls, repeats=3, at_least=0.003) for calls in work)
        except (OutOfResources, PTXASError) as error:
            print(f"  {candidate}: {error}", flush=True)
            continue
        print(f"  {candidate}: {spent * 1e6:.2f} us, off by {wrong:.1g}", flush=True)
        if found is None or spent < found[0]:
            found = (spent, candidate)
    return found[1] if found else None


def tune(seconds: float, keep: Callable[[launch.Table], None] = lambda table: None) -> launch.Table:
    """The family's table with every row replaced that there was time to measure. keep: called with the table whenever
    a row was chosen."""
    deadline = time.monotonic() + seconds
    start = launch.table(launch.family(torch.device("cuda")))
    table = {name: [dict(row) for row in rows] for name, rows in start.items()}
    for choice in choices(start):
        rows = table[choice.kernel]
        if choice.row >= len(rows):
            continue  # this family's table does not tell such sizes apart
        print(choice.kernel, rows[choice.row].get("upto", ""), flush=True)
        row = best(choice, deadline)
        if row is not None:
            rows[choice.row] = {**rows[choice.row], **row}  # what work the row is for stays
            keep(table)
    if time.monotonic() < deadline:
        table["cublas"] = [{"from_rows": crossing(table)}]
        keep(table)
    if time.monotonic() < deadline and torch.cuda.get_device_capability() >= (9, 0) and not torch.version.hip:
        table["overlap"] = [{"launches": overlap_pays(table)}]
        keep(table)
    return table


def overlap_pays(table: launch.Table) -> bool:
    """Whether passes are faster with launches that overlap, and draw the same tokens."""
    apart, overlapping = (step(table, launches) for launches in (False, True))
    same = torch.equal(apart[1], overlapping[1])
    print(f"a step of one image: {apart[0] * 1e6:.1f} us, overlapping {overlapping[0] * 1e6:.1f} us", flush=True)
    if not same:
        print("  WRONG: launches that overlap draw other tokens", flush=True)
    return same and overlapping[0] < apart[0]


def step(table: launch.Table, overlap: bool) -> tuple[float, torch.Tensor]:
    """Seconds of a pass of one image through four layers of the small preset, half way down; and STEP tokens that these
    layers draw."""
    spec = image_gpt.spec(replace(ImageGPTConfig.preset("small"), n_layer=4))
    torch.manual_seed(0)
    weights = {name: torch.randn(shape, device="cuda") / 50 for name, shape in spec.weight_shapes().items()}
    configs = {**table, "overlap": [{"launches": overlap}]}
    engine = TritonEngine(spec, weights, device="cuda", configs=configs)
    run = engine.prepared_pass(n=1, position=spec.n_positions // 2)
    seconds = statistics.median(repeat(run, "cuda", 5, inner=100))
    asked = Request(torch.full((spec.n_positions,), -1), 0, Drawing(seed=0), spec.unconditional, stop=STEP)
    return seconds, loop.run(engine, [asked], batch_size=1, window=1)[0].tokens[:, :STEP]


def crossing(table: launch.Table) -> int:
    """The fewest rows from which on cuBLAS, norm and ending together are faster for both layers of the MLP."""
    cublas = {**table, "cublas": [{"from_rows": 1}]}
    for rows in CROSSING:
        config = launch.settings(table, "norm_linear", rows)
        work = [
            [bench_norm_linear.one(layer, WIDTH, rows, t, c)[0] for layer in ("fc", "out")]
            for t, c in ((table, config), (cublas, None))
        ]
        wrong = max(difference(calls[0]) for calls in work[1])
        if not wrong <= TOLERANCE:
            raise RuntimeError(f"cuBLAS with norm and ending is wrong by {wrong:.3g} of the largest result")
        times = [sum(graph_seconds(calls, repeats=3) for calls in each) for each in work]
        print(f"rows {rows}: kernel {times[0] * 1e6:.2f} us, cuBLAS {times[1] * 1e6:.2f} us", flush=True)
        if times[1] < times[0]:
            return rows
    return 1024


def write(table: launch.Table, path: Path) -> None:
    lines = []
    for name, rows in table.items():
        lines.append(f'  "{name}": [\n' + ",\n".join("    " + json.dumps(row) for row in rows) + "\n  ]")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: fastigpt/kernels/configs/<family>.json")
    parser.add_argument("--seconds", type=float, default=300.0, help="time to spend on measuring")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.tune needs a GPU")
    path = options.out or launch.FOLDER / f"{launch.family(torch.device('cuda'))}.json"
    write(tune(options.seconds, lambda table: write(table, path)), path)
    print(path)


if __name__ == "__main__":
    main()
