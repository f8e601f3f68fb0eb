"""transformers' ImageGPT with random weights, before and after fastigpt.accelerate: the same tokens, and the time.

    python examples/accelerate_imagegpt.py --preset small --tokens 256 --n 1

Needs transformers. Rounds alternate between the two, and the medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

import fastigpt


def timed(model: ImageGPTForCausalImageModeling, start: torch.Tensor, tokens: int) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    result = model.generate(start, max_new_tokens=tokens, do_sample=False)
    return result, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small", choices=["small", "medium", "large"])
    parser.add_argument("--layers", type=int, help="blocks; default: those of the preset")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to draw, at most 1024")
    parser.add_argument("--n", type=int, default=1, help="images at a time")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()

    sizes = fastigpt.ImageGPTConfig.preset(given.preset)
    torch.manual_seed(0)
    config = ImageGPTConfig(n_layer=given.layers or sizes.n_layer, n_head=sizes.n_head, n_embd=sizes.n_embd)
    model = ImageGPTForCausalImageModeling(config).eval().to(given.device, getattr(torch, given.dtype))
    start = torch.full((given.n, 1), sizes.start_token, device=given.device)

    seconds: dict[str, list[float]] = {"transformers": [], "fastigpt": []}
    for round_ in range(given.rounds + 1):  # the first warms up
        tokens = given.tokens if round_ else 2
        fastigpt.restore(model)
        expected, theirs = timed(model, start, tokens)
        fastigpt.accelerate(model)
        found, ours = timed(model, start, tokens)
        same = float((found == expected).float().mean())
        if given.dtype == "float32" and same < 1:
            raise SystemExit(f"greedy tokens differ: {same:.1%} are the same")
        if round_:
            seconds["transformers"].append(theirs)
            seconds["fastigpt"].append(ours)

    engine = fastigpt.accelerate(model).generate.engine()  # type: ignore[attr-defined]
    print(f"{given.preset}, n = {given.n}, {given.tokens} tokens, {engine!r}")
    print(f"{same:.1%} of the greedy tokens are the same")
    for name, times in seconds.items():
        print(f"{name:13}{statistics.median(times):8.2f} s   ({min(times):.2f} to {max(times):.2f})")
    if min(seconds["transformers"]) > max(seconds["fastigpt"]):
        ratio = statistics.median(seconds["transformers"]) / statistics.median(seconds["fastigpt"])
        print(f"{ratio:.1f} times as fast")
    else:
        print("no ratio: the two overlap")


if __name__ == "__main__":
    main()
