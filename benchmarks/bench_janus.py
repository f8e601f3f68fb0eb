"""Janus-Pro-1B, guided, beside `generate` of transformers' own class: made-up weights of its shape, in bfloat16.

    pytest benchmarks/bench_janus.py --benchmark-only
    python benchmarks/bench_janus.py --rounds 3 [--int8]

The first times single passes. The second lets both draw the first tokens of an image and prints seconds per pass, and
of 576 of them; it needs about 10 GB of memory.
"""

from __future__ import annotations

import argparse

import pytest
import torch
from per_pass import Passes, guided_pass, measured, ours

from fastigpt.bench.models import SHAPES, made_up
from fastigpt.engine.choose import build

NAME = "janus-pro-1b"
START, PAD, BOI = 1, 2, 3


def theirs(spec, device: torch.device) -> tuple[Passes, object]:
    """generate(generation_mode="image") of a model whose images have as many tokens as are asked for."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    config = JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": spec.n_prefix_tokens, "hidden_size": spec.width,
            "intermediate_size": spec.block.n_inner, "num_hidden_layers": spec.n_layer,
            "num_attention_heads": spec.block.n_head, "max_position_embeddings": 16384,
        },
        vision_config={"num_hidden_layers": 1, "projection_dim": spec.width},
        vq_config={"projection_dim": spec.width, "image_token_embed_dim": spec.width},
    )  # fmt: skip
    with torch.device("meta"):
        model = JanusForConditionalGeneration(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    language = model.model.language_model
    language.rotary_emb = type(language.rotary_emb)(language.config).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    told = model.generation_config
    told.bos_token_id, told.pad_token_id, told.eos_token_id = START, PAD, None
    told.generation_kwargs, told.max_length = {"boi_token_id": BOI}, 20 + spec.n_positions
    ids = torch.tensor([[START, *range(10, 10 + len(spec.unconditional) - 2), BOI]], device=device)

    def run(count: int) -> object:
        model.model.vision_model.config.num_image_tokens = count
        how = {"generation_mode": "image", "guidance_scale": 5.0, "do_sample": True}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **how)

    return run, model


@pytest.mark.parametrize("who", ["fastigpt", "transformers"])
def bench_pass(benchmark, device, who):
    """A pass of one guided image in the middle of its canvas."""
    benchmark.group = "one pass of Janus-Pro-1B, both branches"
    benchmark.pedantic(guided_pass(who, SHAPES[NAME], device, sequences=2), rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--int8", action="store_true", help="also our engine with int8 weights")
    options = parser.parse_args()
    spec, device = SHAPES[NAME], torch.device(options.device)
    prefix = (START, *range(10, 10 + len(spec.unconditional) - 2), BOI)
    run, _model = theirs(spec, device)
    peers = {"transformers generate": (run, torch.bfloat16)}
    for dtype in [torch.bfloat16, *([torch.int8] if options.int8 else [])]:
        engine = build(spec, made_up(spec), device=device, dtype=dtype)
        peers[f"fastigpt {engine.name} {dtype}"] = ours(engine, 1, 5.0, prefix), dtype
    for name, figures in measured(peers, spec, 2, device, options.rounds).items():
        middle = sorted(figures.seconds)[len(figures.seconds) // 2]
        print(f"{name}: {figures} per pass; {spec.n_positions} of them {middle * spec.n_positions:.0f} s")


if __name__ == "__main__":
    main()
