"""What tests of the CPU engine share: instruction sets, dtypes, shapes, and canvases to draw."""

from __future__ import annotations

from typing import NamedTuple

import torch
from conftest import fill

from fastigpt import _C
from fastigpt.engine.cpu import CpuEngine
from fastigpt.families import image_gpt
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.sampling import Drawing

ISAS = _C.supported_isas()
KINDS = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
    ("int8", "int8"),
    ("float32", "bfloat16"),
]
SHAPES = [
    ImageGPTConfig(2, 2, 128, height=6, width=9, n_colors=100),  # head_dim 64
    ImageGPTConfig(1, 2, 192, height=4, width=5, n_colors=512),  # 96
    ImageGPTConfig(1, 2, 256, height=5, width=8, n_colors=512, n_words=4, prompt_length=3),  # 128
    ImageGPTConfig(3, 3, 15, n_inner=7, height=4, width=9, n_colors=7, n_words=5, prompt_length=19),  # 5
    ImageGPTConfig(2, 1, 40, n_inner=33, height=7, width=3, n_colors=65),  # 40
]
PLAIN, PROMPTED = SHAPES[0], SHAPES[3]


def random_prompt(config: ImageGPTConfig, n: int) -> torch.Tensor | None:
    return torch.randint(0, config.n_words, (n, config.prompt_length)) if config.n_words else None


def cpu_engine(config: ImageGPTConfig, weights: dict[str, torch.Tensor], **options: object) -> CpuEngine:
    return CpuEngine(image_gpt.spec(config), image_gpt.canonical(config, weights), **options)  # type: ignore[arg-type]


def empty(config: ImageGPTConfig, n: int) -> torch.Tensor:
    return torch.full((n, config.n_pixels), -1)


class Case(NamedTuple):
    """Canvases whose image indices count from 5, as the helpers of conftest take them."""

    tokens: torch.Tensor
    drawing: Drawing = Drawing(seed=77)
    prompt: torch.Tensor | None = None
    first_index: int = 5

    def fill(self, engine, window=1):  # type: ignore[no-untyped-def]
        return fill(engine, self.tokens, self.drawing, prompt=self.prompt, first_index=self.first_index, window=window)

    def part(self, some: slice) -> Case:
        prompt = None if self.prompt is None else self.prompt[some]
        return Case(self.tokens[some], self.drawing, prompt, self.first_index + (some.start or 0))
