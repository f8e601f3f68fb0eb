"""The same work by transformers and by plain PyTorch, compiled."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from benchmarks.acceptance.engines import random_weights
from benchmarks.acceptance.results import Rows

SECONDS = 110.0  # most that the stage may take


def peers(out: Path, rows: Rows) -> None:
    """The same work by transformers and by the compiled static cache."""
    import torch
    from static_cache import StaticCacheModel

    from fastigpt import ImageGPTConfig
    from fastigpt.bench.peers import TransformersPeer
    from fastigpt.bench.timing import timed
    from fastigpt.families import image_gpt

    device, config = torch.device("cuda"), ImageGPTConfig.preset("small")
    begun = time.monotonic()

    def room(seconds: float) -> bool:
        return time.monotonic() - begun + seconds < SECONDS - 10

    spec = image_gpt.spec(config)
    weights = random_weights(spec, device)
    theirs = TransformersPeer(config, device, torch.bfloat16).model

    def generate(n: int, length: int) -> None:
        ids = torch.full((n, 1), config.start_token, device=device)
        theirs.generate(ids, max_length=length + 1, min_length=length + 1, do_sample=True, top_k=0, pad_token_id=0)

    def transformers(n: int) -> None:
        generate(n, 8)
        rows.add(work=f"transformers small n={n}", seconds=timed(lambda: generate(n, config.n_pixels), device)[1])

    def static_cache(n: int) -> None:
        model = StaticCacheModel(spec, weights, n, device=device, dtype=torch.bfloat16)
        compile_seconds = timed(partial(model.sample, 8), device)[1]
        seconds = timed(model.sample, device)[1]
        rows.add(work=f"static cache, torch.compile, small n={n}", seconds=seconds, compile_seconds=compile_seconds)

    for peer, n, needed in (
        (transformers, 1, 0),
        (static_cache, 1, 35),
        (static_cache, 64, 35),
        (transformers, 64, 40),
    ):
        if room(needed):
            rows.attempt(f"{peer.__name__} n={n}", partial(peer, n))
    rows.finish()
