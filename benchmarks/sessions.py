"""What a running batch costs: joins, particles, refilled slots, memory over thousands of admissions.

    python benchmarks/sessions.py [--admissions 2000] [--images 512]

Uses the bundled model on the cpu engine. results/sessions.md holds a run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from contextlib import closing

import psutil
import torch
from bench_particles import held_out, hole_in

import fastigpt
from fastigpt.bench.machine import measure_machine
from fastigpt.engine import Session


def seconds_of_row(session: Session, columns: int) -> float:
    """Until the canvases, all taken together, have as many tokens more as a row of each of them has."""
    start = time.perf_counter()
    decided = [a.decided for a in session.step(0.0)]
    goal = sum(decided) + (columns - 1) * len(decided)
    while sum(decided) < goal:
        decided = [a.decided for a in session.step(0.02)]
    return time.perf_counter() - start


def joins(model: fastigpt.ImageGPT, others: int = 63, trials: int = 7) -> tuple[list[float], list[float]]:
    """Seconds of a row of all `others` together, and of the first row of a canvas that joins them, pairs of one
    moment."""
    spec, alone, joined = model.spec, [], []
    empty = torch.full((others + 1, spec.n_positions), -1)
    wanted = model.requests(empty, seed=0)
    for trial in range(trials):
        with closing(model.engine.open(others + 1)) as session:
            session.add(wanted[:others])
            for _ in range(2 + 2 * trial):
                seconds_of_row(session, spec.columns)
            alone.append(seconds_of_row(session, spec.columns))
            start = time.perf_counter()
            newcomer = session.add(wanted[others:])[0]
            while {a.slot: a.decided for a in session.step(0.02)}[newcomer] < spec.columns:
                pass
            joined.append(time.perf_counter() - start)
    return alone, joined


def admissions(model: fastigpt.ImageGPT, count: int, capacity: int = 24) -> list[float]:
    """Resident MiB after every tenth of `count` random admissions and removals: prompts, guidance, known tokens."""
    rng, process = random.Random(0), psutil.Process()
    words = model.vocabulary.examples if model.vocabulary else ()
    tokens = model.sample(8, seed=1, output_type="tokens")
    found, running = [], []
    with closing(model.engine.open(capacity)) as session:
        for k in range(count):
            while len(running) == capacity:
                session.remove(running.pop(rng.randrange(capacity)))
            canvas = tokens[k % 8].clone()
            canvas[rng.randrange(model.spec.n_positions) :] = -1
            how = {"prompt": rng.choice(words), "guidance_scale": rng.choice([None, 2.0])} if k % 2 else {}
            running += session.add(model.requests(canvas[None], seed=k, **how))
            session.step(0.0)
            if rng.random() < 0.2:
                session.remove(running.pop(rng.randrange(len(running))))
            if (k + 1) % (count // 10) == 0:
                found.append(process.memory_info().rss / 2**20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--admissions", type=int, default=2000)
    parser.add_argument("--images", type=int, default=512)
    options = parser.parse_args()
    machine = measure_machine(torch.device("cpu"))
    print(machine)
    model = fastigpt.load()
    model.sample(64, seed=9, output_type="tokens")

    alone, joined = joins(model)
    ratios = sorted(j / a for a, j in zip(alone, joined))
    print(
        f"row of 63 together: median {statistics.median(alone):.3f} s; first row of one that joins "
        f"{statistics.median(joined):.3f} s; "
        f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )

    images, mask = held_out(1), hole_in(model, "square")
    seconds: dict[int, list[float]] = {1: [], 16: []}
    for round_ in range(6):
        for k, times in seconds.items():
            start = time.perf_counter()
            model.complete(images, mask=mask, particles=k, seed=round_, output_type="tokens")
            if round_:
                times.append(time.perf_counter() - start)
    ratios = sorted(b / a for a, b in zip(seconds[1], seconds[16]))
    print(
        f"square hole: particles=1 {statistics.median(seconds[1]):.3f} s, particles=16 "
        f"{statistics.median(seconds[16]):.3f} s; ratio {statistics.median(ratios):.1f} ({ratios[0]:.1f} to "
        f"{ratios[-1]:.1f})"
    )

    rss = admissions(model, options.admissions)
    print(f"{options.admissions} admissions, MiB after each tenth: {', '.join(f'{mib:.0f}' for mib in rss)}")

    start = time.perf_counter()
    model.sample(options.images, seed=3, batch_size=64, output_type="tokens")
    taken = 1e3 * (time.perf_counter() - start) / options.images
    print(f"{options.images} images in slots of 64: {taken:.1f} ms an image")


if __name__ == "__main__":
    main()
