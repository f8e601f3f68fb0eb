"""Who is measured: an engine of ours, or transformers' generate step, each asked for a pass at a position."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

import torch

from fastigpt.engine import Engine
from fastigpt.families.image_gpt.config import ImageGPTConfig


class Peer(Protocol):
    """Something that decodes. Caches have made-up contents: the time of a pass does not depend on them.

    window: tokens that its passes score. tokens_per_pass: how many of them a pass decides, as measured; 1 for a window
    of one, None if nobody measured it.
    """

    name: str
    dtype: torch.dtype
    kv_dtype: torch.dtype
    window: int
    tokens_per_pass: float | None

    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        """A function that draws a token (scores a window) for each of n images at this position, once a call."""
        ...


class EnginePeer:
    """An engine of this library. tokens_per_pass: of windows that images were drawn with."""

    def __init__(self, engine: Engine, window: int = 1, tokens_per_pass: float | None = None) -> None:
        self.window, self.tokens_per_pass = window, 1.0 if window == 1 else tokens_per_pass
        self.dtype, self.kv_dtype = engine.dtype, engine.kv_dtype
        self.name = f"fastigpt {engine.name}"
        self.prepared_pass = engine.prepared_pass


class TransformersPeer:
    """The step of transformers' generate: forward with its DynamicCache, softmax, multinomial."""

    window = 1
    tokens_per_pass: float | None = 1.0

    def __init__(self, config: ImageGPTConfig, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import ImageGPTConfig as HfConfig
        from transformers import ImageGPTForCausalImageModeling

        theirs = HfConfig(
            vocab_size=config.n_colors + 1,
            n_positions=config.n_pixels,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_inner=config.n_inner,
        )
        self.config, self.device, self.dtype, self.kv_dtype = config, device, dtype, dtype
        self.model = ImageGPTForCausalImageModeling(theirs).eval().to(device, dtype)
        self.name = "transformers"

    @staticmethod
    def why_unavailable() -> str | None:
        return None if find_spec("transformers") else "transformers is not installed"

    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        from transformers import DynamicCache

        config = self.config
        cache = DynamicCache()
        shape = (n, config.n_head, position, config.head_dim)
        for layer in range(config.n_layer):
            keys, values = (torch.randn(shape, device=self.device).to(self.dtype) for _ in range(2))
            cache.update(keys, values, layer)
        ids = torch.zeros(n, window, dtype=torch.int64, device=self.device)

        @torch.inference_mode()
        def run() -> None:
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            torch.multinomial(logits[:, -1].float().softmax(-1), 1)
            cache.crop(-window)  # what was appended goes again, so that each pass is the same

        return run
