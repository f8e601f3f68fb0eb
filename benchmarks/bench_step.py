"""One pass that draws a token for each of n images, early, in the middle and late in the image, beside its peers.

    pytest benchmarks/bench_step.py --benchmark-only

extra_info: bytes and operations of the pass, its floor at the limits measured in this run, the share of the floor.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from fastigpt import ImageGPT, ImageGPTConfig
from fastigpt.bench.floor import pass_floor
from fastigpt.bench.peers import EnginePeer, Peer, TransformersPeer
from fastigpt.engine.choose import build, choose
from fastigpt.engine.memory import synchronize
from fastigpt.families import image_gpt

CONFIG = ImageGPTConfig.preset("small")
POSITIONS = (32, 512, 992)


@lru_cache(maxsize=1)
def weights() -> dict[str, torch.Tensor]:
    return image_gpt.canonical(CONFIG, ImageGPT.from_config(CONFIG, backend="reference", device="cpu").weights)


def make(name: str, device: torch.device, request: pytest.FixtureRequest) -> Peer:
    if name == "static cache":
        return request.getfixturevalue("static_cache")
    best = choose(device)
    if name == "transformers":
        missing = TransformersPeer.why_unavailable()
        if missing:
            pytest.skip(missing)
        return TransformersPeer(CONFIG, device, torch.bfloat16)
    kinds = {
        "fastigpt": (best, "bfloat16", "bfloat16"),
        "fastigpt, int8 weights": (best, "int8", "bfloat16"),
        "fastigpt, int8 cache": (best, "bfloat16", "int8"),
        "portable": ("portable", "bfloat16", "bfloat16"),
    }
    backend, dtype, kv_dtype = kinds[name]
    if backend != "cpu" and dtype == "int8":
        pytest.skip(f"int8 weights are for the cpu engine; here {backend} is the fastest")
    engine = build(image_gpt.spec(CONFIG), weights(), backend=backend, device=device, dtype=dtype, kv_dtype=kv_dtype)
    return EnginePeer(engine)


@pytest.fixture(
    scope="module",
    params=["fastigpt", "fastigpt, int8 weights", "fastigpt, int8 cache", "static cache", "portable", "transformers"],
)
def peer(request, device):
    return make(request.param, device, request)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("n", [1, 64])
def bench_pass(benchmark, peer, machine, device, n, position):
    benchmark.group = f"one pass, n={n}, position {position}"
    launch = peer.prepared_pass(n=n, position=position)

    def work() -> None:
        launch()
        synchronize(device)  # on a GPU the call alone is only the launch

    benchmark.pedantic(work, rounds=5 if n == 1 else 3, iterations=1, warmup_rounds=1)
    gemm = machine.gemm["bfloat16"]
    floor = pass_floor(
        image_gpt.spec(CONFIG),
        n=n,
        position=position,
        window=1,
        dtype=peer.dtype,
        kv_dtype=peer.kv_dtype,
        bandwidth=machine.bandwidth,
        gemm=gemm,
    )
    benchmark.extra_info.update(
        bytes=floor.bytes,
        operations=floor.operations,
        floor_seconds=floor.seconds,
        share_of_floor=floor.seconds / benchmark.stats.stats.median,
        bandwidth=machine.bandwidth,
        gemm=gemm,
    )
