"""Who is measured: an engine of ours, or transformers' generate step, each asked for the time of passes at a
position."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Protocol

import torch

from fastigpt.config import ImageGPTConfig
from fastigpt.engine import Engine
from fastigpt.engine.memory import synchronize


class Peer(Protocol):
    """Something that decodes. Caches have made-up contents: the time of a pass does not depend on them."""

    name: str
    dtype: torch.dtype
    kv_dtype: torch.dtype

    def pass_seconds(self, *, n: int, position: int, window: int, repeats: int) -> list[float]:
        """Seconds of `repeats` passes that draw a token (score a window) for each of n images at this position."""
        ...


class EnginePeer:
    """An engine of this library."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.dtype, self.kv_dtype = engine, engine.dtype, engine.kv_dtype
        self.name = f"fastigpt {engine.name}"

    def pass_seconds(self, *, n: int, position: int, window: int, repeats: int) -> list[float]:
        return self.engine.pass_seconds(n=n, position=position, window=window, repeats=repeats)


class TransformersPeer:
    """The step of transformers' generate: forward with its DynamicCache, softmax, multinomial."""

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

    @torch.inference_mode()
    def pass_seconds(self, *, n: int, position: int, window: int, repeats: int) -> list[float]:
        from transformers import DynamicCache

        config = self.config
        cache = DynamicCache()
        shape = (n, config.n_head, position, config.head_dim)
        for layer in range(config.n_layer):
            keys, values = (torch.randn(shape, device=self.device).to(self.dtype) for _ in range(2))
            cache.update(keys, values, layer)
        ids = torch.zeros(n, window, dtype=torch.int64, device=self.device)
        times = []
        for _ in range(repeats + 1):
            synchronize(self.device)
            started = time.perf_counter()
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            torch.multinomial(logits[:, -1].float().softmax(-1), 1)
            synchronize(self.device)
            times.append(time.perf_counter() - started)
            cache.crop(-window)
        return times[1:]
