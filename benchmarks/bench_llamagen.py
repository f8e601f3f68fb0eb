"""LlamaGen-B at 384 × 384, guided, beside transformers' LlamaModel in LlamaGen's own loop: made-up weights, bfloat16.

    pytest benchmarks/bench_llamagen.py --benchmark-only
    python benchmarks/bench_llamagen.py --rounds 3 -n 8

The first times single passes. The second lets both draw n whole images and prints seconds per pass, and of 576 of
them: a cache that grows is a part of it.
"""

from __future__ import annotations

import argparse

import pytest
import torch
from per_pass import Passes, guided_pass, measured, ours

from fastigpt.bench.models import SHAPES, made_up
from fastigpt.bench.peers import LlamaPeer
from fastigpt.engine.choose import build

NAME, SCALE, TOP_K = "llamagen-b", 4.0, 2000
LABEL = 207


def theirs(peer: LlamaPeer, n: int) -> Passes:
    """LlamaGen's loop: a class, then tokens, conditional sequences first; guidance, top-k, softmax, multinomial."""
    from transformers import DynamicCache

    @torch.inference_mode()
    def run(count: int) -> object:
        cache, ids = DynamicCache(), torch.zeros(2 * n, 1, dtype=torch.int64, device=peer.device)
        for _ in range(count):
            hidden = peer.model(inputs_embeds=peer.tokens(ids), past_key_values=cache, use_cache=True)
            conditional, unconditional = peer.head(hidden.last_hidden_state[:, -1]).float().chunk(2)
            logits = unconditional + SCALE * (conditional - unconditional)
            kth = logits.topk(TOP_K).values[:, -1:]
            drawn = torch.multinomial(logits.masked_fill(logits < kth, -torch.inf).softmax(-1), 1)
            ids = torch.cat([drawn, drawn])
        return ids

    return run


@pytest.mark.parametrize("who", ["fastigpt", "transformers"])
def bench_pass(benchmark, device, who):
    """A pass of eight guided images in the middle of their canvases."""
    benchmark.group = "one pass of LlamaGen-B, eight images, both branches"
    benchmark.pedantic(guided_pass(who, SHAPES[NAME], device, sequences=16), rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=[name for name in SHAPES if name.startswith("llamagen")], default=NAME)
    parser.add_argument("-n", type=int, default=8, help="images")
    options = parser.parse_args()
    spec, device = SHAPES[options.model], torch.device(options.device)
    engine = build(spec, made_up(spec), device=device, dtype=torch.bfloat16)
    peer = LlamaPeer(spec, device, torch.bfloat16, guided=True)
    peers = {
        "transformers LlamaModel": (theirs(peer, options.n), torch.bfloat16),
        f"fastigpt {engine.name}": (ours(engine, options.n, SCALE, (LABEL,), top_k=TOP_K), torch.bfloat16),
    }
    for name, figures in measured(peers, spec, 2 * options.n, device, options.rounds, spec.n_positions).items():
        middle = sorted(figures.seconds)[len(figures.seconds) // 2]
        print(f"{name}: {figures} per pass; {spec.n_positions} of them {middle * spec.n_positions:.0f} s")


if __name__ == "__main__":
    main()
