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
from dataclasses import dataclass
from operator import truediv
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

CROSSING = (16, 32, 64, 128, 256, 512)  # rows at which the kernel is compared with cuBLAS
WIDTHS = (512, 1536)  # of the layers that rows of "norm_linear" are chosen by: small's and large's
IMAGES = (1, 8, 64)  # of the rows of "decode_attention", in its order
HEADS = ((8, 64), (16, 96))  # one row serves all head dims: small's and large's
SEQUENCES = (16, 1024, 8)  # batch, length and heads of causal attention
STEP = 64  # positions that are drawn to compare launches that overlap with those that do not
MOST: int | None = None  # candidates for a row; a dry run tries fewer
MANY = 512  # rows of activations at most; a dry run has fewer
TOLERANCE = 2e-2  # of the largest result: kernels and twins round at different places, to bfloat16

Row = dict[str, Any]
Calls = list[Callable[[], object]]
Layers = list[tuple[str, int]]  # name and width, as bench_norm_linear.one takes them


@dataclass(frozen=True)
class Choice:
    """A row of a table to be chosen by measurement. calls: for a candidate, lists of calls that cycle through cold
    inputs, a list for each work that the row is for. Each call is a partial of the kernel's launcher."""

    kernel: str
    row: int
    candidates: list[Row]
    calls: Callable[[Row], list[Calls]]


def choices(table: launch.Table) -> Iterator[Choice]:
    """Every row that is tuned, on the shapes of the small preset unless it says otherwise."""
    for i, row in enumerate(table["norm_linear"]):
        rows = row.get("upto", 512)
        counts = (1, min(rows, MANY)) if rows <= 16 else (min(rows, MANY),)
        layers = served(table["norm_linear"], i, rows)

        def linear(candidate: Row, counts: tuple[int, ...] = counts, layers: Layers = layers) -> list[Calls]:
            return [bench_norm_linear.one(*layer, rows, table, candidate)[0] for layer in layers for rows in counts]

        if layers:
            yield Choice("norm_linear", i, linear_candidates(rows), linear)
    keys = bench_decode_attention.KEYS * 3 // 4  # half of them would just fill eight programs with a block each
    block_s = table["decode_attention"][0]["block_s"]  # what a result depends on is not for the tuner to choose
    for i, (splits, n) in enumerate(zip(((1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4)), IMAGES)):

        def decode(candidate: Row, n: int = n) -> list[Calls]:
            return [
                bench_decode_attention.one(n, *s, window, torch.bfloat16, table, candidate, keys)[0]
                for s in HEADS for window in (1, 8)
            ]  # fmt: skip

        candidates = [{"block_s": block_s, "splits": split, "stages": stages, "warps": warps}
                      for split in splits for stages, warps in ((3, 4), (4, 4), (3, 8), (3, 2))]  # fmt: skip
        yield Choice("decode_attention", i, candidates, decode)
    for i, head_dim in enumerate((64, 128)):

        def causal(candidate: Row, head_dim: int = head_dim) -> list[Calls]:
            return [[bench_causal_attention.one(*SEQUENCES, head_dim, table, candidate)[0]]]

        sizes = ((64, 64, 3, 4), (128, 64, 2, 4), (128, 64, 3, 8), (128, 128, 2, 8))
        names = ("block_m", "block_n", "stages", "warps")
        yield Choice("causal_attention", i, [dict(zip(names, size)) for size in sizes], causal)


def served(rows: list[Row], i: int, count: int) -> Layers:
    """Layers of the small and the large preset that take row i for so many rows of activations."""
    found = []
    for width in WIDTHS:
        for layer, (inside, outside) in bench_norm_linear.LAYERS.items():
            if launch.first_row(rows, count, k=inside * width, n=outside * width) is rows[i]:
                found.append((layer, width))
    return found


def linear_candidates(rows: int) -> list[Row]:
    """What a result comes to is the same with all of them: see fastigpt/kernels/products.py."""
    names = ("block_m", "block_n", "block_k", "stages", "warps", "early", "apart")
    few = ((16, 8, 64, 2, 8, True), (16, 8, 64, 4, 8, True), (16, 8, 128, 2, 8, True), (16, 8, 64, 2, 4, True),
           (16, 16, 64, 2, 8, True), (16, 16, 64, 3, 8, True), (16, 16, 64, 3, 8, False), (16, 16, 64, 3, 4, True),
           (16, 32, 64, 2, 8, True))  # fmt: skip
    some = ((16, 8, 64, 3, 8, True), (32, 8, 32, 3, 8, True), (32, 8, 64, 2, 8, True), (32, 16, 32, 3, 8, True),
            (32, 16, 64, 2, 8, False), (32, 32, 32, 3, 8, False), (32, 16, 64, 3, 4, False), (64, 8, 64, 2, 8, False),
            (64, 16, 32, 3, 8, False))  # fmt: skip
    many = ((32, 32, 32, 3, 8, False), (32, 64, 32, 3, 8, False), (64, 32, 32, 3, 8, False), (64, 32, 64, 2, 8, False),
            (32, 64, 64, 2, 8, False), (64, 64, 32, 2, 8, False), (32, 32, 64, 2, 8, False), (32, 16, 64, 3, 8, False),
            (64, 64, 64, 2, 8, False), (64, 16, 64, 2, 4, False))  # fmt: skip
    if rows <= 16:
        return [dict(zip(names, (*size, False))) for size in few]
    if rows <= 64:
        return [dict(zip(names, (*size, apart))) for apart in (False, True) for size in some]
    return [dict(zip(names, (*size, True))) for size in many]


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
    launched drop out. Fastest is who takes least in the mean of all works, of which each counts alike."""
    found: list[tuple[list[float], Row]] = []
    for candidate in choice.candidates[:MOST]:
        if time.monotonic() > deadline:
            break
        try:
            work = choice.calls(candidate)
            wrong = max(difference(calls[0]) for calls in work)
            if not wrong <= TOLERANCE:  # nor may it be NaN
                print(f"  {candidate}: WRONG by {wrong:.3g} of the largest result", flush=True)
                continue
            spent = [graph_seconds(calls, repeats=3, at_least=0.003) for calls in work]
        except (OutOfResources, PTXASError) as error:
            print(f"  {candidate}: {error}", flush=True)
            continue
        print(f"  {candidate}: {', '.join(f'{1e6 * each:.2f}' for each in spent)} us, off by {wrong:.1g}", flush=True)
        found.append((spent, candidate))
    least = [min(each) for each in zip(*(spent for spent, _ in found))]
    return min(found, key=lambda one: sum(map(truediv, one[0], least)))[1] if found else None


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
        print(choice.kernel, rows[choice.row], flush=True)
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
    """Whether passes of few and of many images are faster in the mean with launches that overlap, and draw the same
    tokens."""
    ratios = []
    for n in IMAGES:
        apart, overlapping = (step(table, launches, n) for launches in (False, True))
        print(f"a step of {n} images: {apart[0] * 1e6:.1f} us, overlapping {overlapping[0] * 1e6:.1f} us", flush=True)
        if not torch.equal(apart[1], overlapping[1]):
            print("  WRONG: launches that overlap draw other tokens", flush=True)
            return False
        ratios.append(overlapping[0] / apart[0])
    return statistics.mean(ratios) < 1


def step(table: launch.Table, overlap: bool, n: int) -> tuple[float, torch.Tensor]:
    """Seconds of a pass of n images through the small preset, half way down; and STEP tokens that it draws of each. All
    of its layers: the weights of a few would stay in the second level cache, where overlapping pays and else does not.
    """
    spec = image_gpt.spec(ImageGPTConfig.preset("small"))
    torch.manual_seed(0)
    weights = {name: torch.randn(shape, device="cuda") / 50 for name, shape in spec.weight_shapes().items()}
    configs = {**table, "overlap": [{"launches": overlap}]}
    engine = TritonEngine(spec, weights, device="cuda", configs=configs)
    run = engine.prepared_pass(n=n, position=spec.n_positions // 2)
    seconds = statistics.median(repeat(run, "cuda", 5, inner=100))
    empty = torch.full((spec.n_positions,), -1)
    asked = [Request(empty, i, Drawing(seed=0), spec.unconditional, stop=STEP) for i in range(n)]
    return seconds, loop.run(engine, asked, batch_size=n, window=1)[0].tokens[:, :STEP]


def crossing(table: launch.Table) -> int:
    """The fewest rows from which on cuBLAS, norm and ending together are faster for both layers of the MLP."""
    kernel, cublas = ({**table, "cublas": [{"from_rows": rows}]} for rows in (10**9, 1))
    for rows in CROSSING:
        work = [
            [bench_norm_linear.one(layer, WIDTHS[0], rows, each)[0] for layer in ("fc", "out")]
            for each in (kernel, cublas)
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
