"""README.md of a run, and plots: each figure asked for beside what was measured, and all rows of all stages."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.acceptance.engines import floor_seconds
from benchmarks.acceptance.results import Results

H200 = 4.3e12  # bytes per second that copies move on the GPU for which seconds were asked


@dataclass(frozen=True)
class Target:
    """A figure that is asked for: `key` of the row `work` of `stage`. reach, stretch: of "share_of_floor" or
    "share_of_bandwidth" what part of what this machine's memory allows, so that any GPU can be held to it."""

    stage: str
    work: str
    key: str
    reach: float
    stretch: float | None = None


def of_floor(preset: str, n: int, seconds: tuple[float, float], cache: str = "bfloat16") -> Target:
    """Asked for as seconds for n images on an H200: as shares of the floor there."""
    import torch

    from fastigpt import ImageGPTConfig
    from fastigpt.bench.floor import kv_bytes_per_token
    from fastigpt.families import image_gpt

    config = ImageGPTConfig.preset(preset)
    floor = floor_seconds(config, n, kv_bytes_per_token(image_gpt.spec(config), getattr(torch, cache)), H200)
    reach, stretch = (floor / each for each in seconds)
    return Target("engine", f"{preset} n={n} {cache} cache", "share_of_floor", reach, stretch)


def targets() -> list[Target]:
    pixel = (3 + 8) / H200  # seconds to read one of three bytes and write its int64
    return [
        of_floor("small", 1, (0.35, 0.15)),
        of_floor("small", 64, (0.65, 0.48)),
        of_floor("small", 512, (512 / 130, 512 / 160)),
        *(of_floor("small", 512, (512 / 220, 512 / 300), cache) for cache in ("int8", "float8_e4m3fn")),
        of_floor("large", 64, (3.8, 3.2)),
        Target("kernels", "decode_attention small n=64 W=1 bfloat16", "share_of_bandwidth", 0.85),
        Target("engine", "completion, half known, 64 results", "speed_up", 1.8),
        Target("quantise", "512 colours, uint8", "share_of_floor", 10e9 * pixel),
    ]


def measured(out: Path) -> list[dict[str, object]]:
    """Each target beside what was measured: its row, or that there is none."""
    results, lines = Results(out), []
    for target in targets():
        row = next((r for r in results.of(target.stage) if r.get("work") == target.work and target.key in r), None)
        line: dict[str, object] = {"work": target.work, "figure": target.key.replace("_", " ")}
        line |= {"measured": "not measured" if row is None else row[target.key], "reach": target.reach}
        line |= {"stretch": "" if target.stretch is None else target.stretch}
        line["met"] = "" if row is None else "yes" if row[target.key] >= target.reach else "no"
        seconds = None if row is None else row.get("seconds")
        line["seconds"] = "" if seconds is None else seconds
        lines.append(line)
    return lines


def table(rows: list[dict]) -> list[str]:
    """Rows of one kind as Markdown, columns in order of appearance."""
    if not rows:
        return ["Nothing was measured."]
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: object) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", " ").replace("|", "/")
        return text if len(text) < 200 else "… " + text[-200:]  # of an error or a log the end tells most

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(cell(row.get(c, "")) for c in columns) + " |" for row in rows]


def summary(out: Path, stages: list[dict]) -> str:
    """One table: each stage, whether all of it was well, and what was not."""
    results, rows = Results(out), []
    for row in stages:
        parts = results.of(row["stage"])
        failed = [part for part in parts if "error" in part and not isinstance(part["error"], int)]
        failed += [part for part in parts if part.get("ok") is False or part.get("returncode")]
        names = [str(part.get("work", part.get("step"))) for part in failed]
        rows.append(
            {
                "stage": row["stage"],
                "": "ok" if row["ok"] else "FAILED",
                "seconds": row["seconds"],
                "parts": len(parts),
                "not well": "; ".join(filter(None, [str(row.get("result", "")), *names])),
            }
        )
    return "\n".join(table(rows))


def report(out: Path, stages: list[dict[str, object]]) -> None:
    """README.md, and plots where matplotlib is installed."""
    results = Results(out)
    limits = (results.of("machine") or [{"name": "unknown GPU"}])[0]
    lines = [f"# {limits['name']}", "", time.strftime("Measured on %Y-%m-%d by `python -m benchmarks.acceptance`."), ""]
    if "bandwidth" in limits:
        terabytes, teraflops = limits["bandwidth"] / 1e12, limits["gemm"]["bfloat16"] / 1e12
        lines.append(f"In this run: copies at {terabytes:.2f} TB/s, bf16 products at {teraflops:.0f} TFLOP/s, ")
        lines += [f"torch {limits['torch']}. Launch configurations: {limits['family']}, {limits['table']}.", ""]
    lines += ["## Targets", "", "Shares of what the memory bandwidth above allows; a speed-up is a ratio.", ""]
    lines += table(measured(out))
    for stage in ("engine", "peers", "kernels", "quantise", "tune", "tests", "memcheck"):
        lines += ["", f"## {stage}", "", *table(results.of(stage))]
    lines += ["", "## Stages", "", *table(stages), ""]
    (out / "README.md").write_text("\n".join(lines))
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for stage, key in (("kernels", "share_of_bandwidth"), ("engine", "share_of_floor")):
        bars = [(row["work"], row[key]) for row in results.of(stage) if key in row]
        if bars:
            figure, axes = plt.subplots(figsize=(9, 0.3 * len(bars) + 1), layout="constrained")
            axes.barh([name for name, _ in bars], [value for _, value in bars])
            axes.axvline(1.0, color="black", linewidth=0.8)
            axes.set_xlabel(key.replace("_", " "))
            axes.invert_yaxis()
            figure.savefig(out / f"{stage}.png", dpi=120)
