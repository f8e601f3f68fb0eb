"""What the engine's tests share: requests of tiny models, and the canvases that come of them."""

from __future__ import annotations

import torch
from conftest import random_weights
from llama_blocks import llama_weights

from fastigpt.engine import loop
from fastigpt.engine.reference import ReferenceEngine
from fastigpt.engine.triton import TritonEngine
from fastigpt.families import image_gpt
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.job import Request
from fastigpt.sampling import Drawing
from fastigpt.spec import BlockSpec, ModelSpec

SMALL = ImageGPTConfig(n_layer=1, n_head=2, n_embd=16, height=3, width=3, n_colors=7)
PROMPTED = ImageGPTConfig(
    n_layer=2, n_head=1, n_embd=16, n_inner=20, height=2, width=3, n_colors=5, n_words=4, prompt_length=2
)


LLAMA = ModelSpec(
    n_layer=2, width=16, block=BlockSpec(3, 1, 6, 20, 1e-5, "gated_silu"), height=2, columns=3, n_tokens=5,
    n_prefix_tokens=PROMPTED.n_words + 1, prefix_length=PROMPTED.prompt_length + 1, unconditional=(PROMPTED.n_words,),
    positions="rotary", head_inner=24,
)  # fmt: skip
"""Of the canvas, tokens and prefixes of PROMPTED, so that the same requests go to both. Heads are padded, and share
their keys."""
BLOCKS = {"image gpt": PROMPTED, "llama": LLAMA}


def weights_of(config, seed, biases=True):
    """The spec and weights of an Image GPT's configuration, or of a spec."""
    if isinstance(config, ModelSpec):
        return config, llama_weights(config, seed, biases=biases)
    return image_gpt.spec(config), image_gpt.canonical(config, random_weights(config, seed=seed, biases=biases))


def both(config, device, seed, biases=True, **options):
    """The reference and the triton engine with the same weights. config: of an Image GPT, or a spec."""
    spec, weights = weights_of(config, seed, biases)
    options = {"dtype": torch.float32, **options}
    return ReferenceEngine(spec, weights), TritonEngine(spec, weights, device=device, **options)


def empty(config, n):
    return torch.full((n, config.n_pixels), -1)


def requests(config, tokens, drawing, prompts=None, first_index=2**33, **options):
    """A request for each row of tokens. drawing: one for all, or one for each; prompts: words for each, or None."""
    drawings = [drawing] * len(tokens) if isinstance(drawing, Drawing) else drawing
    unprompted = image_gpt.prefix(config)
    return [
        Request(
            row, first_index + i, each,
            prefix=unprompted if prompts is None or prompts[i] is None else image_gpt.prefix(config, prompts[i]),
            negative=None if each.guidance_scale is None else unprompted, **options,
        )
        for i, (row, each) in enumerate(zip(tokens, drawings))
    ]  # fmt: skip


def fill(engine, asked, **options):
    """A Filled of the requests, from the loop."""
    return loop.run(engine, asked, **{"batch_size": len(asked), **options})[0]
