"""README.md of a run, and plots: each figure asked for beside what was measured, and all rows of all stages."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.acceptance.results import Results

TARGETS = {  # the figures asked for on an H200 in bf16: what, reach, stretch
    "small n=1, seconds per image": (0.35, 0.15),
    "small n=64, seconds": (0.65, 0.48),
    "small n=512, images/s": (130.0, 160.0),
    "small n=512 float8_e4m3fn cache, images/s": (220.0, 300.0),
    "large n=64, seconds": (3.8, 3.2),
    "completion speed-up by prefix sharing": (1.8, None),
    "nearest centroid, 512 colours, uint8, Gpixel/s": (10.0, None),
}


def figures(out: Path) -> dict[str, float]:
    """The measured value of each target."""
    results = Results(out)
    found = {row["work"]: row for row in results.of("engine") if "error" not in row}
    values = {}
    for target, work, key in (
        ("small n=1, seconds per image", "small n=1 bfloat16 cache", "seconds"),
        ("small n=64, seconds", "small n=64 bfloat16 cache", "seconds"),
        ("small n=512, images/s", "small n=512 bfloat16 cache", "images_per_second"),
        ("small n=512 float8_e4m3fn cache, images/s", "small n=512 float8_e4m3fn cache", "images_per_second"),
        ("large n=64, seconds", "large n=64 bfloat16 cache", "seconds"),
        ("completion speed-up by prefix sharing", "completion, 16 rows known, 64 results", "speed_up"),
    ):
        if work in found:
            values[target] = found[work][key]
    for row in results.of("nearest_centroid"):
        if row["work"] == "512 colours, uint8":
            values["nearest centroid, 512 colours, uint8, Gpixel/s"] = row["gigapixels"]
    return values


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
        lines += [f"torch {limits['torch']}.", ""]
    values = figures(out)
    lines += ["## Targets", "", "| | measured | reach | stretch |", "| --- | --- | --- | --- |"]
    for name, (reach, stretch) in TARGETS.items():
        measured = f"{values[name]:.4g}" if name in values else "not measured"
        lines.append(f"| {name} | {measured} | {reach} | {stretch if stretch is not None else '–'} |")
    for stage in ("engine", "peers", "kernels", "nearest_centroid", "tests", "memcheck"):
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
