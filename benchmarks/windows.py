"""Fixed-point sampling measured: passes, tokens per pass and seconds for every window, beside window = 1 in the same
run.

    python benchmarks/windows.py                # the tables of results/windows.md
    python benchmarks/windows.py --check 1024   # tokens of that many images, every window against window = 1

Seconds are medians of jobs that take turns. The last table puts the acceptance of the bundled model on the small
preset's shape: passes per image at each window as counted here, times the measured time of such passes of that shape.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median

import torch

import fastigpt
from fastigpt import ImageGPT, ImageGPTConfig
from fastigpt.bench.machine import measure_machine
from fastigpt.bench.measure import whole_images
from fastigpt.bench.report import machine_line
from fastigpt.bench.timing import repeat

WINDOWS: tuple[int | str, ...] = (1, 2, 3, 4, 6, 8, 12, 16, "auto")
POSITIONS = (32, 512, 960)


def race(model: ImageGPT, n: int, rounds: int, windows: list[int | str]) -> dict[int | str, tuple[float, float]]:
    """Window to (median seconds of a job, mean passes per image); all windows take turns on the same seeds."""
    seconds: dict[int | str, list[float]] = {window: [] for window in windows}
    passes: dict[int | str, list[float]] = {window: [] for window in windows}
    for seed in range(-1, rounds):  # the first round warms up and is not counted
        for window in windows:
            tokens, stats = model.sample(n, seed=seed + 1, window=window, output_type="tokens", return_stats=True)
            if window == windows[0]:
                expected = tokens
            assert torch.equal(tokens, expected), f"window {window} changed the tokens"
            if seed >= 0:
                seconds[window].append(stats.seconds)
                passes[window].append(float(stats.passes.double().mean()))
    return {w: (median(seconds[w]), sum(passes[w]) / rounds) for w in windows}


def tables(rounds: int, images: list[int], windows: list[int | str]) -> None:
    device = torch.device("cpu")
    print(machine_line(measure_machine(device)), "\n")
    model = fastigpt.load(device=device)
    acceptance: dict[int | str, float] = {}
    for n in images:
        found = race(model, n, rounds if n < 64 else max(3, rounds // 4), windows)
        base = found[windows[0]][0]
        print(f"bundled model, n = {n}, {model.dtype}, cache {model.engine.kv_dtype}\n")
        print(f"| window | passes per image | tokens per pass | seconds | times window {windows[0]} |")
        print("|---|---|---|---|---|")
        for window, (seconds, passes) in found.items():
            print(f"| {window} | {passes:.0f} | {1024 / passes:.2f} | {seconds:.3f} | {base / seconds:.2f} |")
        print()
        if n == 1:
            acceptance = {window: passes for window, (_, passes) in found.items() if window != "auto"}
    if not acceptance:
        return
    small = ImageGPT.from_config(ImageGPTConfig.preset("small"), device=device)
    print(f"small preset, n = 1, {small.dtype}: time of a pass, the bundled model's acceptance replayed\n")
    print("| window | ms per pass at 32 / 512 / 960 | passes | seconds | times window 1 |\n|---|---|---|---|---|")
    base = 0.0
    for window, passes in acceptance.items():
        times = [
            median(repeat(small.engine.prepared_pass(n=1, position=p, window=int(window)), device, 7))
            for p in POSITIONS
        ]
        seconds = whole_images(POSITIONS, times, 1024) * passes / 1024
        base = base or seconds
        shown = " / ".join(f"{1e3 * t:.2f}" for t in times)
        print(f"| {window} | {shown} | {passes:.0f} | {seconds:.2f} | {base / seconds:.2f} |")


def check(count: int) -> None:
    """Settings a user may combine, in float32 and bfloat16; every window's tokens must be those of window = 1."""
    half = torch.zeros(32, 32, dtype=torch.bool)
    half[8:24, 4:28] = True
    total = 0
    for dtype in ("float32", "bfloat16"):
        model = fastigpt.load(device="cpu", dtype=dtype, kv_dtype=dtype)
        canvas = model.sample(count // 8, seed=99, window=1, output_type="tokens").masked_fill(half.flatten(), -1)
        jobs = {
            "plain": lambda window, m=model: m.sample(count // 8, seed=1, window=window, output_type="tokens"),
            "filters": lambda window, m=model: m.sample(
                count // 8, seed=2, temperature=0.9, top_k=40, top_p=0.95, window=window, output_type="tokens"
            ),
            "forced tokens": lambda window, m=model, c=canvas: m.fill(c, seed=3, window=window),
            "prompt and guidance": lambda window, m=model: m.sample(
                count // 8,
                prompt="a red house on snow at night",
                guidance_scale=2.0,
                seed=4,
                window=window,
                output_type="tokens",
            ),
        }
        for name, job in jobs.items():
            expected = job(1)
            for window in (2, 8, "auto"):
                same = int((job(window) == expected).all(1).sum())
                print(f"{dtype}, {name}, window {window}: {same} of {len(expected)} images the same", flush=True)
                if same != len(expected):
                    sys.exit(1)
            total += len(expected)
    print(f"{total} images, each the same at windows 1, 2, 8 and auto")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--check", type=int, default=0, metavar="IMAGES")
    parser.add_argument(
        "--images", type=int, nargs="+", default=[1, 8, 64], help="images of a job; the last table needs 1"
    )
    parser.add_argument("--windows", type=lambda w: w if w == "auto" else int(w), nargs="+", default=list(WINDOWS))
    options = parser.parse_args()
    check(options.check) if options.check else tables(options.rounds, options.images, options.windows)
