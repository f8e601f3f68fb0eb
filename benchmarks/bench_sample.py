"""Whole images: the bundled model and the small preset, n = 1 and 64, beside transformers, CTranslate2 and a compiled
static cache.

    pytest benchmarks/bench_sample.py --benchmark-only [--full]

Without --full, what takes more than half a minute is put together from passes at three positions (early, middle, late):
extra_info["extrapolated"] says so, and seconds_per_job is the figure to read; the benchmark's own time is then that of
the three passes.
"""

from __future__ import annotations

import pytest
import torch

import fastigpt
from fastigpt import ImageGPT, ImageGPTConfig
from fastigpt.bench.measure import whole_images
from fastigpt.bench.peers import EnginePeer, TransformersPeer
from fastigpt.bench.timing import timed

CONFIG = ImageGPTConfig.preset("small")
POSITIONS = (32, 512, 992)


@pytest.fixture(scope="module")
def small(device):
    return ImageGPT.from_config(CONFIG, device=device)


@pytest.mark.parametrize("window", [1, "auto"])
@pytest.mark.parametrize("n", [1, 64])
def bench_bundled_model(benchmark, device, n, window):
    benchmark.group = f"bundled model, n={n}"
    model = fastigpt.load(device=device)
    seeds = iter(range(1000))
    passes = []

    def draw() -> None:
        _, stats = model.sample(n, seed=next(seeds), window=window, output_type="np", return_stats=True)
        passes.append(float(stats.passes.double().mean()))

    benchmark.pedantic(draw, rounds=5, iterations=1, warmup_rounds=1)
    benchmark.extra_info.update(
        seconds_per_job=benchmark.stats.stats.median,
        images_per_second=n / benchmark.stats.stats.median,
        passes_per_image=sum(passes) / len(passes),
        extrapolated=False,
    )


def bench_small_one_image(benchmark, small):
    benchmark.group = "small preset, n=1"
    benchmark.pedantic(lambda: small.sample(1, seed=0, window=1, output_type="tokens"), rounds=2, iterations=1)
    benchmark.extra_info.update(seconds_per_job=benchmark.stats.stats.median, extrapolated=False)


def bench_small_one_image_ctranslate2(benchmark, tmp_path_factory):
    benchmark.group = "small preset, n=1"
    ctranslate2 = pytest.importorskip("ctranslate2")
    from baselines.ctranslate2_gpt2 import build

    folder = tmp_path_factory.mktemp("ctranslate2")
    generator = build(CONFIG, folder, ctranslate2)
    draw = lambda: generator.generate_batch(  # noqa: E731
        [["<start>"]], max_length=CONFIG.n_pixels, min_length=CONFIG.n_pixels, sampling_topk=0
    )
    benchmark.pedantic(draw, rounds=1, iterations=1)
    benchmark.extra_info.update(seconds_per_job=benchmark.stats.stats.median, extrapolated=False)


def bench_small_one_image_static_cache(benchmark, static_cache, device):
    benchmark.group = "small preset, n=1"
    from_passes(benchmark, static_cache, 1, device)


@pytest.mark.parametrize("n", [1, 64])
def bench_small_transformers(benchmark, device, full, n):
    benchmark.group = f"small preset, n={n}"
    missing = TransformersPeer.why_unavailable()
    if missing:
        pytest.skip(missing)
    peer = TransformersPeer(CONFIG, device, torch.bfloat16)
    if full:
        ids = torch.full((n, 1), CONFIG.start_token, device=device)
        draw = lambda: peer.model.generate(  # noqa: E731
            ids, max_length=CONFIG.n_pixels + 1, do_sample=True, top_k=0, pad_token_id=0
        )
        benchmark.pedantic(draw, rounds=1, iterations=1)
        benchmark.extra_info.update(seconds_per_job=benchmark.stats.stats.median, extrapolated=False)
    else:
        from_passes(benchmark, peer, n, device)


def bench_small_64_images(benchmark, small, full, device):
    benchmark.group = "small preset, n=64"
    if full:
        benchmark.pedantic(lambda: small.sample(64, seed=0, window=1, output_type="tokens"), rounds=1, iterations=1)
        benchmark.extra_info.update(seconds_per_job=benchmark.stats.stats.median, extrapolated=False)
    else:
        from_passes(benchmark, EnginePeer(small.engine), 64, device)


def from_passes(benchmark, peer, n, device) -> None:
    """Times one pass at each of three positions, three times over, and puts a whole job together from the medians."""
    works = [peer.prepared_pass(n=n, position=position) for position in POSITIONS]
    times = [[] for _ in POSITIONS]

    def three_passes() -> None:
        for work, found in zip(works, times):
            found.append(timed(work, device)[1])

    benchmark.pedantic(three_passes, rounds=3, iterations=1, warmup_rounds=1)
    medians = [sorted(found[1:])[1] for found in times]
    benchmark.extra_info.update(
        seconds_per_job=whole_images(POSITIONS, medians, CONFIG.n_pixels),
        milliseconds_at=dict(zip(map(str, POSITIONS), (1e3 * m for m in medians))),
        extrapolated=True,
    )
