"""Chooses launch configurations by measurement and writes kernels/configs/<family>.json.

    python -m benchmarks.tune [--out FILE] [--seconds N]

Candidates are timed by replaying CUDA graphs on cold caches. What the time does not suffice for keeps its row.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import bench_causal_attention
import bench_decode_attention
import bench_norm_linear
from fastigpt.kernels import launch
from gpu_time import graph_seconds

Row = dict[str, Any]


def decode_rows(window: int) -> Iterator[tuple[Row, Callable[[Row], float]]]:
    """(row to improve, seconds of a candidate) for sizes of lanes × heads."""
    for size, n in ((16, 1), (128, 8), (None, 64)):

        def seconds(candidate: Row, n: int = n) -> float:
            calls, _ = bench_decode_attention.one(n, 8, 64, window, torch.bfloat16, {}, candidate)
            return graph_seconds(calls, repeats=3, at_least=0.003)

        yield {"upto": size} if size else {}, seconds


def decode_candidates(size: int | None) -> list[Row]:
    splits = (8, 16) if size == 16 else (2, 4) if size == 128 else (1, 2)
    return [{"block_s": block, "splits": split, "stages": stages, "warps": 4}
            for split in splits for block, stages in ((64, 1), (64, 3), (128, 2))]  # fmt: skip


def linear_candidates(rows: int) -> list[Row]:
    names = ("block_m", "block_n", "block_k", "stages", "warps")
    if rows == 1:
        sizes = ((1, 2, 512, 2, 2), (1, 4, 512, 1, 4), (1, 4, 512, 2, 4), (1, 8, 512, 1, 4), (1, 4, 1024, 1, 4))
    else:
        m = max(16, rows)
        sizes = ((m, 16, 128, 3, 4), (m, 32, 64, 4, 4), (m, 32, 128, 3, 4), (16, 16, 128, 4, 4), (16, 32, 128, 4, 4))
    return [dict(zip(names, size)) for size in sizes]


def best(candidates: list[Row], seconds: Callable[[Row], float], deadline: float) -> Row | None:
    """The fastest candidate; None if there was no time for one. Those that cannot be launched drop out."""
    from triton.runtime.errors import OutOfResources

    found: tuple[float, Row] | None = None
    for candidate in candidates:
        if time.monotonic() > deadline:
            break
        try:
            spent = seconds(candidate)
        except OutOfResources as error:
            print(f"  {candidate}: {error}", flush=True)
            continue
        print(f"  {candidate}: {spent * 1e6:.2f} us", flush=True)
        if found is None or spent < found[0]:
            found = (spent, candidate)
    return found[1] if found else None


def tune(seconds: float) -> launch.Table:
    """The family's table with every row replaced that there was time to measure."""
    deadline = time.monotonic() + seconds
    start = launch.table(launch.family(torch.device("cuda")))
    table = {name: [dict(row) for row in rows] for name, rows in start.items()}

    def keep(kernel: str, i: int, row: Row | None) -> None:
        if row is not None:
            limit = {"upto": table[kernel][i]["upto"]} if "upto" in table[kernel][i] else {}
            table[kernel][i] = {**limit, **row}

    for i, rows in enumerate((1, 16, 32, 64)):

        def linear(candidate: Row, rows: int = rows) -> float:
            return sum(graph_seconds(bench_norm_linear.one(layer, 512, rows, table, candidate)[0], repeats=3,
            at_least=0.003)
                       for layer in ("fc", "out"))  # fmt: skip

        print("norm_linear rows", rows, flush=True)
        keep("norm_linear", i, best(linear_candidates(rows), linear, deadline))
    if time.monotonic() < deadline:
        table["cublas"] = [{"from_rows": crossing(table)}]
    for kernel, window in (("decode_attention_1", 1), ("decode_attention", 8)):
        for i, (limit, timed) in enumerate(decode_rows(window)):
            print(kernel, limit, flush=True)
            keep(kernel, i, best(decode_candidates(limit.get("upto")), timed, deadline))
    for i, head_dim in enumerate((64, 128)):

        def causal(candidate: Row, head_dim: int = head_dim) -> float:
            return graph_seconds([bench_causal_attention.one(16, 1024, 8, head_dim, {}, candidate)[0]], repeats=3)

        sizes = ((64, 64, 3, 4), (128, 64, 2, 4), (128, 64, 3, 8), (128, 128, 2, 8))
        candidates = [dict(zip(("block_m", "block_n", "stages", "warps"), size)) for size in sizes]
        print("causal_attention", head_dim, flush=True)
        keep("causal_attention", i, best(candidates, causal, deadline))
    return table


def crossing(table: launch.Table) -> int:
    """The fewest rows from which on cuBLAS, norm and ending together are faster for both layers of the MLP."""
    cublas = {**table, "cublas": [{"from_rows": 1}]}
    for rows in (8, 16, 32, 64, 128, 256, 512):
        config = launch.settings(table, "norm_linear", rows)
        times = [
            sum(graph_seconds(bench_norm_linear.one(layer, 512, rows, t, c)[0], repeats=3) for layer in ("fc", "out"))
            for t, c in ((table, config), (cublas, None))
        ]
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
    parser.add_argument("--out", type=Path, help="default: kernels/configs/<family>.json")
    parser.add_argument("--seconds", type=float, default=300.0, help="time to spend on measuring")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.tune needs a GPU")
    path = options.out or launch.FOLDER / f"{launch.family(torch.device('cuda'))}.json"
    write(tune(options.seconds), path)
    print(path)


if __name__ == "__main__":
    main()
