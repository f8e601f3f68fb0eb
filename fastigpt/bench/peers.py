"""Who is measured: an engine of ours, or transformers' generate step, each asked for a pass at a position."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Protocol

import torch

from fastigpt.engine import Engine
from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.sampling import guide
from fastigpt.spec import ModelSpec


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


class LlamaPeer:
    """transformers' LlamaModel in the loop that draws images with it, as its Janus has it and LlamaGen's code: the
    embedding of a token, LlamaModel with a DynamicCache, the image head, guidance, softmax, multinomial."""

    window = 1
    tokens_per_pass: float | None = 1.0
    name = "transformers"

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, *, guided: bool) -> None:
        from transformers import LlamaConfig, LlamaModel

        block = spec.block
        config = LlamaConfig(
            vocab_size=8,  # words are not read here
            hidden_size=spec.width,
            intermediate_size=block.n_inner,
            num_hidden_layers=spec.n_layer,
            num_attention_heads=block.n_head,
            num_key_value_heads=block.n_kv_head,
            head_dim=block.head_dim,
            max_position_embeddings=spec.context + 1,
            rms_norm_eps=block.norm_epsilon,
        )
        with torch.device("meta"):
            model: Any = LlamaModel(config)
        self.model = model.to(dtype).to_empty(device=device).eval()
        self.model.rotary_emb = type(self.model.rotary_emb)(config).to(device)
        self.spec, self.device, self.dtype, self.kv_dtype, self.guided = spec, device, dtype, dtype, guided
        sizes = [spec.width, *([] if spec.head_inner is None else [spec.head_inner]), spec.n_tokens]
        layers = [torch.nn.Linear(a, b, device=device, dtype=dtype) for a, b in pairwise(sizes)]
        self.head = torch.nn.Sequential(layers[0], *(part for each in layers[1:] for part in (torch.nn.GELU(), each)))
        self.tokens = torch.nn.Embedding(spec.n_tokens, spec.width, device=device, dtype=dtype)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(0.01)

    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        """n: sequences, the first half of them conditional if images are guided."""
        from transformers import DynamicCache

        block, cache = self.spec.block, DynamicCache()
        shape = (n, block.n_kv_head, position, block.head_dim)
        for layer in range(self.spec.n_layer):
            keys, values = (torch.randn(shape, device=self.device).to(self.dtype) for _ in range(2))
            cache.update(keys, values, layer)
        ids = torch.zeros(n, window, dtype=torch.int64, device=self.device)

        @torch.inference_mode()
        def run() -> None:
            hidden = self.model(inputs_embeds=self.tokens(ids), past_key_values=cache, use_cache=True)
            logits = self.head(hidden.last_hidden_state[:, -1]).float()
            if self.guided:
                conditional, unconditional = logits.chunk(2)
                logits = guide(conditional, unconditional, 5.0)
            torch.multinomial(logits.softmax(-1), 1)
            cache.crop(-window)

        return run
