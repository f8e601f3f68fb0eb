"""What a benchmark run is shown as: a table for people, JSON for files, a plot of throughput against n."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from fastigpt.bench.machine import Machine
from fastigpt.bench.measure import Timing, ratio
from fastigpt.files import replacing


def machine_line(machine: Machine) -> str:
    rates = ", ".join(f"{name} products {rate / 1e9:.0f} GFLOP/s" for name, rate in machine.gemm.items())
    return f"{machine.name}, {machine.threads} threads: reads {machine.bandwidth / 1e9:.1f} GB/s, {rates}"


def table(timings: Sequence[Timing], baseline: str) -> Table:
    """Rows of every peer at every n; `baseline`: the peer that ratios are taken to."""
    positions = timings[0].positions
    sheet = Table(box=None, pad_edge=False)
    for heading in ("n", "peer", "weights", "cache"):
        sheet.add_column(heading, justify="right" if heading == "n" else "left")
    sheet.add_column("window, tokens", justify="right")
    for position in positions:
        sheet.add_column(f"ms at {position}", justify="right")
    for heading in ("±", "s for n images", "images/min", "of floor", f"to {baseline}"):
        sheet.add_column(heading, justify="right")
    for t in timings:
        base = next((other for other in timings if other.peer == baseline and other.n == t.n), None)
        sheet.add_row(
            str(t.n),
            t.peer,
            t.dtype,
            t.kv_dtype,
            f"{t.window}, {_figure(t.tokens_per_pass, 2)}",
            *(f"{ms:.2f}" for ms in t.milliseconds()),
            f"{100 * t.spread():.0f} %",
            _figure(t.seconds(), 2),
            _figure(t.images_per_minute(), 1),
            f"{100 * t.share_of_floor():.0f} %",
            "" if base is None or base is t else ratio(base, t),
        )
    return sheet


def _figure(value: float | None, digits: int) -> str:
    """A figure that may not be known."""
    return "–" if value is None else f"{value:.{digits}f}"


def as_json(config: Any, machine: Machine, timings: Sequence[Timing]) -> dict[str, Any]:
    """config: a dataclass, of the model's family or its spec."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.as_dict(),
        "config": asdict(config),
        "timings": [
            {
                **asdict(t),
                "milliseconds": t.milliseconds(),
                "seconds": t.seconds(),
                "floor_seconds": t.floor_seconds(),
                "share_of_floor": t.share_of_floor(),
                "images_per_minute": t.images_per_minute(),
            }
            for t in timings
        ],
    }


def write_json(path: Path, figures: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")


def plot_throughput(path: Path, timings: Sequence[Timing]) -> None:
    """Images per minute against n, each peer a line, each floor a dashed line of the same colour. All must be known."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 4.5))
    floors = set()
    for k, name in enumerate(dict.fromkeys((t.peer, t.dtype, t.kv_dtype) for t in timings)):
        mine = sorted((t for t in timings if (t.peer, t.dtype, t.kv_dtype) == name), key=lambda t: t.n)
        counts = [t.n for t in mine]
        label = f"{name[0]}, {name[1]}" + ("" if name[1] == name[2] else f", {name[2]} cache")
        axes.plot(counts, [60 * t.n / (t.seconds() or 1) for t in mine], "o-", color=f"C{k}", label=label)
        if (*name[1:], mine[0].window) not in floors:  # the same for all who read the same bytes
            floors.add((*name[1:], mine[0].window))
            axes.plot(counts, [60 * t.n / (t.floor_seconds() or 1) for t in mine], "--", color=f"C{k}", alpha=0.5)
    axes.plot([], [], "--", color="grey", label="the machine's limit, by precision")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({t.n for t in timings}), [str(n) for n in sorted({t.n for t in timings})])
    axes.set_xlabel("images at a time")
    axes.set_ylabel("images per minute")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)
