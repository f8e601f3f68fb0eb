"""Image GPT: what a checkpoint in the Hugging Face format is to the engines.

A prefix is the words of a prompt (none, or all `prompt_length` slots) and the start token. Words have embeddings and
positions of their own; the start token is the last row of the pixels' embedding and stands at the first pixel's
position. Linear weights are stored [in, out]; engines get transposed views, so nothing is copied but small tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.spec import BlockSpec, ModelSpec

_LINEARS = {"attn.c_attn": "qkv", "attn.c_proj": "proj", "mlp.c_fc": "fc", "mlp.c_proj": "out"}


def spec(config: ImageGPTConfig) -> ModelSpec:
    return ModelSpec(
        n_layer=config.n_layer,
        width=config.n_embd,
        block=BlockSpec(config.n_head, config.n_head, config.head_dim, config.inner, config.layer_norm_epsilon),
        height=config.height,
        columns=config.width,
        n_tokens=config.n_colors,
        n_prefix_tokens=config.n_words + 1,
        prefix_length=config.prompt_length + 1,
        unconditional=(config.n_words,),
    )


def prefix(config: ImageGPTConfig, words: Sequence[int] = ()) -> tuple[int, ...]:
    """Words of a prompt (all of its slots, or none), then start."""
    return (*words, config.n_words)


def canonical(config: ImageGPTConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names and in the orientation of ModelSpec.weight_shapes(); most are views."""
    tokens, positions = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
    start = tokens[config.n_colors : config.n_colors + 1]
    words = config.n_words > 0
    found = {
        "prefix.embedding": torch.cat([weights["prompt.wte.weight"], start]) if words else start,
        "token.embedding": tokens[: config.n_colors],
        "positions": torch.cat([weights["prompt.wpe.weight"], positions]) if words else positions,
        "norm": weights["transformer.ln_f.weight"],
        "head.weight": weights["lm_head.weight"],
    }
    for i in range(config.n_layer):
        theirs, ours = f"transformer.h.{i}.", f"blocks.{i}."
        found[ours + "norm_1"] = weights[theirs + "ln_1.weight"]
        found[ours + "norm_2"] = weights[theirs + "ln_2.weight"]
        for name, part in _LINEARS.items():
            found[f"{ours}{part}.weight"] = weights[f"{theirs}{name}.weight"].T
            if f"{theirs}{name}.bias" in weights:
                found[f"{ours}{part}.bias"] = weights[f"{theirs}{name}.bias"]
    return found


def published(config: ImageGPTConfig) -> dict[str, str]:
    """The name that a published checkpoint has for each of canonical()'s tensors, for messages."""
    found = {
        "token.embedding": "transformer.wte.weight",
        "prefix.embedding": "prompt.wte.weight" if config.n_words else "transformer.wte.weight",
        "positions": "transformer.wpe.weight",
        "norm": "transformer.ln_f.weight",
        "head.weight": "lm_head.weight",
    }
    for i in range(config.n_layer):
        theirs, ours = f"transformer.h.{i}.", f"blocks.{i}."
        found |= {f"{ours}norm_{k}": f"{theirs}ln_{k}.weight" for k in (1, 2)}
        for name, part in _LINEARS.items():
            found |= {f"{ours}{part}.{what}": f"{theirs}{name}.{what}" for what in ("weight", "bias")}
    return found
