"""What is measured: a checkpoint, or the shape of a published model with made-up weights, made when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastigpt import checkpoint
from fastigpt.families.image_gpt.config import PRESETS, ImageGPTConfig
from fastigpt.families.janus import JanusConfig
from fastigpt.families.llama import spec as llama_spec
from fastigpt.families.llamagen import LlamaGenConfig
from fastigpt.families.pretrained import Pretrained
from fastigpt.model import ImageGPT
from fastigpt.spec import ROTARY, ModelSpec
from fastigpt.tensors import Tensors

_PROMPT = 16  # tokens in front of a Janus's canvas; positions are counted from its end


@dataclass(frozen=True)
class Measured:
    """branches: sequences of an image, 2 if it is guided. pretrained: None for made-up weights, which say nothing of
    how many guesses are right. config: of the family, or the spec."""

    spec: ModelSpec
    weights: Mapping[str, torch.Tensor]
    branches: int
    pretrained: Pretrained | None
    config: Any


def find(name: str) -> Measured:
    """A preset, a directory or a hub id. Raises CheckpointError."""
    if name in SHAPES:
        spec = SHAPES[name]
        return Measured(spec, made_up(spec), 2, None, spec)
    if name in PRESETS:
        random = ImageGPT.from_config(ImageGPTConfig.preset(name), backend="reference", device="cpu").pretrained
        return Measured(random.spec, random.canonical(), 1, None, random.config)
    return of(checkpoint.read(checkpoint.locate(name)))


def of(pretrained: Pretrained) -> Measured:
    branches = 2 if pretrained.defaults.get("guidance_scale", 1) != 1 else 1
    return Measured(pretrained.spec, pretrained.canonical(), branches, pretrained, pretrained.config)


def made_up(spec: ModelSpec) -> Tensors:
    """Weights in bfloat16, numbers that repeat: what a pass takes does not depend on them."""
    block = torch.randn(1 << 20, generator=torch.Generator("cpu").manual_seed(0), device="cpu").mul_(0.02).bfloat16()

    def make(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name == ROTARY:
            return torch.tensor([1.0, 0.0], device="cpu").expand(shape).clone()
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device="cpu")
        count = shape[0] * shape[1]
        return block.repeat(-(-count // len(block)))[:count].view(shape)

    shapes = spec.weight_shapes()
    if spec.head_inner is not None:
        shapes |= {name: spec.bias_shapes()[name] for name in ("head.fc.bias", "head.bias")}
    return Tensors({name: partial(make, name, shape) for name, shape in shapes.items()})


def _janus(n_layer: int, width: int, n_head: int, n_inner: int) -> ModelSpec:
    config = JanusConfig(n_layer, n_head, n_head, width // n_head, width, n_inner, 102400, 16384, 8, 24, 24)
    return llama_spec(
        config,
        n_prefix_tokens=config.vocabulary,
        prefix_length=config.prompt_length,
        unconditional=(0,) * _PROMPT,
        head_inner=width,
    )


def _llamagen(n_layer: int, width: int, n_head: int, n_inner: int) -> ModelSpec:
    config = LlamaGenConfig(n_layer, n_head, n_head, width, n_inner, 16384, 1000, 24, 24)
    return llama_spec(config, n_prefix_tokens=1001, prefix_length=1, unconditional=(1000,))


SHAPES = {
    "janus-pro-1b": _janus(24, 2048, 16, 5632),
    "janus-pro-7b": _janus(30, 4096, 32, 11008),
    "llamagen-b": _llamagen(12, 768, 12, 2048),
    "llamagen-l": _llamagen(24, 1024, 16, 2816),
    "llamagen-xl": _llamagen(36, 1280, 20, 3584),
    "llamagen-xxl": _llamagen(48, 1536, 24, 4096),
    "llamagen-3b": _llamagen(24, 3200, 32, 8704),
}
"""Published shapes, for images of 384 × 384."""
