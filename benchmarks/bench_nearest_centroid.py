"""Nearest centroid beside its peers: one round of a peer, one of ours, in turn, in one process, both warm.

    pytest benchmarks/bench_nearest_centroid.py --benchmark-only

Each row's extra_info holds millions of points per second, the ratio of the medians, the share of equal indices, and the
peak of memory beyond what was there before. Peers get float32 points; ours gets the uint8 pixels where there are such.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from baselines import nearest as peers

import fastigpt.nearest as nearest
from fastigpt.bench.timing import timed
from fastigpt.codecs.palette import Palette
from fastigpt.nearest import NearestCentroid, nearest_centroid

RNG = np.random.default_rng(0)
N_PIXELS = 1 << 20
CLUSTERS = RNG.uniform(-1, 1, (512, 3)).astype(np.float32)
PIXELS = RNG.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
COLORS = (PIXELS.reshape(-1, 3) / 127.5 - 1).astype(np.float32)
CODES = RNG.standard_normal((16384, 8)).astype(np.float32)
VECTORS = RNG.standard_normal((65536, 8)).astype(np.float32)
LEVELS = ((CLUSTERS + 1) * 127.5).astype(np.float32)  # the clusters, where a pixel stands for its value
WIDE_CODES = RNG.standard_normal((8192, 256)).astype(np.float32)
WIDE_VECTORS = RNG.standard_normal((16384, 256)).astype(np.float32)


def peak_memory(job: Callable[[], object]) -> float:
    """MB beyond the start, by reading the resident size every millisecond."""
    psutil = pytest.importorskip("psutil")
    process, done = psutil.Process(), threading.Event()
    start = top = process.memory_info().rss

    def watch() -> None:
        nonlocal top
        while not done.wait(0.001):
            top = max(top, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    job()
    done.set()
    watcher.join()
    return (top - start) / 1e6


def race(benchmark, ours: Callable[[], np.ndarray], peer: Callable[[], np.ndarray], n: int, rounds: int) -> None:
    try:
        theirs = peer()
    except ImportError as error:
        pytest.skip(str(error))
    mine = ours()
    peer_times: list[float] = []

    def one_of_theirs() -> None:
        # Each side runs once untimed before it is timed, on caches of its own, and after a pause, because a peer's
        # OpenMP threads spin on for a while and would take a core from whoever comes next.
        time.sleep(0.3)
        peer()
        peer_times.append(timed(peer)[1])
        time.sleep(0.3)
        ours()

    benchmark.pedantic(ours, setup=one_of_theirs, rounds=rounds)
    median, peer_median = benchmark.stats.stats.median, statistics.median(peer_times)
    benchmark.extra_info.update(
        {
            "ours, M points/s": round(n / median / 1e6, 3),
            "peer, M points/s": round(n / peer_median / 1e6, 3),
            "times the peer": round(peer_median / median, 2),
            "equal": float((mine.reshape(-1) == theirs).mean()),
            "ours, peak MB": round(peak_memory(ours), 1),
            "peer, peak MB": round(peak_memory(peer), 1),
        }
    )
    print("\n   ", benchmark.name, benchmark.extra_info)


@pytest.mark.parametrize("peer", [*peers.POINTS, *peers.PIXELS])
def bench_uint8_pixels(benchmark, peer: str) -> None:
    """1,048,576 random uint8 pixels against 512 colours, palette built."""
    palette = Palette(CLUSTERS)
    if peer in peers.POINTS:
        race(benchmark, lambda: palette.encode(PIXELS), lambda: peers.POINTS[peer](COLORS, CLUSTERS), N_PIXELS, 5)
    else:
        small = PIXELS[:256, :256]  # the full size would take gigabytes
        race(benchmark, lambda: palette.encode(small), lambda: peers.PIXELS[peer](small, CLUSTERS), small.size // 3, 3)


def bench_uint8_pixels_with_a_new_palette(benchmark) -> None:
    """The same, the table of colours built first."""
    benchmark.pedantic(lambda: Palette(CLUSTERS).encode(PIXELS), rounds=7, warmup_rounds=1)
    cold = N_PIXELS / benchmark.stats.stats.median / 1e6
    build = min(timed(lambda: Palette(CLUSTERS).encode(PIXELS[:1, :1]))[1] for _ in range(7))
    benchmark.extra_info.update({"M points/s": round(cold, 1), "build, ms": round(build * 1e3, 1)})
    print("\n   ", benchmark.name, benchmark.extra_info)


@pytest.mark.parametrize("call", ["first", "second"])
def bench_uint8_pixels_by_the_plain_function(benchmark, call: str) -> None:
    """nearest_centroid on the same pixels: with a codebook that it sees for the first time, or again."""

    def ours() -> np.ndarray:
        if call == "first":
            nearest._recent = ()
        return nearest_centroid(PIXELS, LEVELS)

    race(benchmark, ours, lambda: peers.POINTS["faiss"](COLORS, CLUSTERS), N_PIXELS, 5)


@pytest.mark.parametrize("n", [1, 64, 1024, 4096])
@pytest.mark.parametrize("by", ["index", "function"])
def bench_small_batches(benchmark, n: int, by: str) -> None:
    """n float32 colours against 512: what one call takes."""
    points, index = COLORS[:n], NearestCentroid(CLUSTERS)
    job = (lambda: index.search(points)) if by == "index" else (lambda: nearest_centroid(points, CLUSTERS))
    benchmark.pedantic(job, rounds=30, iterations=100, warmup_rounds=2)
    benchmark.extra_info["us"] = round(benchmark.stats.stats.median * 1e6, 1)


@pytest.mark.parametrize("peer", peers.POINTS)
def bench_float32_pixels(benchmark, peer: str) -> None:
    """1,048,576 float32 colours against 512."""
    race(
        benchmark,
        lambda: nearest_centroid(COLORS, CLUSTERS),
        lambda: peers.POINTS[peer](COLORS, CLUSTERS),
        N_PIXELS,
        5,
    )


@pytest.mark.parametrize("peer", ["faiss", "torch.cdist"])
def bench_codebook_of_16384_by_8(benchmark, peer: str) -> None:
    """65,536 × 8 against 16,384, normally distributed: no structure to help a search."""
    race(benchmark, lambda: nearest_centroid(VECTORS, CODES), lambda: peers.POINTS[peer](VECTORS, CODES), 65536, 5)


@pytest.mark.parametrize("peer", ["faiss", "torch.cdist"])
def bench_codebook_of_8192_by_256(benchmark, peer: str) -> None:
    """16,384 × 256 against 8,192."""
    race(
        benchmark,
        lambda: nearest_centroid(WIDE_VECTORS, WIDE_CODES),
        lambda: peers.POINTS[peer](WIDE_VECTORS, WIDE_CODES),
        16384,
        5,
    )
