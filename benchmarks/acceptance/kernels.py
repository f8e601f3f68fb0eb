"""Kernels beside the machine's limits and their peers, with launch configurations that were chosen on this GPU."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

from benchmarks.acceptance.building import compile_on_all_cores
from benchmarks.acceptance.results import Results, Rows
from benchmarks.acceptance.tables import digest

TUNING = 190.0  # most seconds of the stage "tune"
COMPILING = {"tune": 60.0, "kernels": 40.0}  # most seconds for that, of those of the stage
PIXELS = 1 << 26


def machine(out: Path, rows: Rows) -> None:
    """The limits of this GPU, or of the processor where kernels are interpreted, and the launch configurations that
    this run uses."""
    import torch

    from fastigpt.bench.machine import measure_machine
    from fastigpt.kernels import launch

    device = torch.device("cpu" if launch.interpreting() else "cuda")
    found, family = measure_machine(device), launch.family(device)
    rows.add(**found.as_dict(), torch=torch.__version__, cuda=torch.version.cuda, family=family,
             table=digest(launch.table(family)))  # fmt: skip


def tune(out: Path, rows: Rows) -> None:
    compile_on_all_cores("tune", out, COMPILING["tune"])
    import torch
    import tune as tuning

    from fastigpt.kernels import launch

    family = launch.family(torch.device("cuda"))

    def keep(table: launch.Table) -> None:
        tuning.write(table, launch.FOLDER / f"{family}.json")
        tuning.write(table, out / f"{family}.json")

    table = tuning.tune(TUNING - COMPILING["tune"] - 35, keep)
    keep(table)
    rows.add(family=family, table=digest(table), changed=[k for k, v in launch.table(family).items() if v != table[k]])


def compile_tune(share: int, shares: int) -> None:
    import tune as tuning

    tuning.rehearse(share, shares)


KERNELS = ("decode_attention", "causal_attention", "norm_linear", "sample_head")


def kernels(out: Path, rows: Rows) -> None:
    """Every kernel beside its peers."""
    compile_on_all_cores("kernels", out, COMPILING["kernels"])
    limits = Results(out).machine()

    def one(name: str) -> None:
        limit = limits["gemm"]["bfloat16"] if name == "causal_attention" else limits["bandwidth"]
        for row in importlib.import_module(f"bench_{name}").measure(limit):
            rows.add(**row)

    for name in KERNELS:
        rows.attempt(name, partial(one, name))
    rows.finish()


def compile_kernels(share: int, shares: int) -> None:
    for name in KERNELS[share::shares]:
        importlib.import_module(f"bench_{name}").measure(1.0)


def quantise(out: Path, rows: Rows) -> None:
    """Nearest centroid of 67 and 17 million pixels, beside the bytes it must move: points, and an int64 for each."""
    import numpy as np
    import torch

    import fastigpt
    from fastigpt.bench.timing import graph_seconds

    limits = Results(out).machine()
    clusters = np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32)
    palette, centroids = fastigpt.Palette(clusters), torch.from_numpy(clusters).cuda()
    pixels = torch.randint(0, 256, (PIXELS, 3), dtype=torch.uint8, device="cuda")
    colors = torch.rand(PIXELS // 4, 3, device="cuda") * 2 - 1
    for work, points, call in (
        ("512 colours, uint8", pixels, lambda: palette.encode(pixels)),
        ("512 colours, float32", colors, lambda: fastigpt.nearest_centroid(colors, centroids)),
    ):
        seconds = graph_seconds([call])
        moved = len(points) * (points[0].nbytes + 8)
        floor = moved / limits["bandwidth"]
        rows.add(work=work, seconds=seconds, gigapixels=len(points) / seconds / 1e9, share_of_floor=floor / seconds)
