"""The truth: an Image GPT in plain PyTorch, without a cache, that every other engine is tested against.

Follows OpenAI's src/model.py (github.com/openai/image-gpt): pre-norm blocks, norm without mean or bias, no causal look
at the last pixel. Slow on purpose: each token is drawn after running the whole sequence again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fastigpt.config import ImageGPTConfig
from fastigpt.engine import Drawing, Filled, Job, OnRow
from fastigpt.engine.arithmetic import converted, finite, undisturbed
from fastigpt.sampling import draw, guide


class ReferenceEngine:
    """float32 or float64, any torch device. `weights`: tensors named and shaped as config.tensor_shapes() says, and any
    of config.bias_shapes()."""

    name = "reference"

    def __init__(
        self,
        config: ImageGPTConfig,
        weights: dict[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.config, self.device, self.dtype = config, torch.device(device), dtype or torch.float32
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the reference engine runs in float32 or float64, not {self.dtype}")
        if kv_dtype not in (None, self.dtype):
            raise ValueError(f"the reference engine has no cache: kv_dtype must be None, not {kv_dtype}")
        self.kv_dtype = self.dtype
        self.weights = {name: converted(name, w, self.device, self.dtype) for name, w in weights.items()}

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """[..., in] → [..., out]; weights are stored [in, out]."""
        y = x @ self.weights[name + ".weight"]
        bias = self.weights.get(name + ".bias")
        return y if bias is None else y + bias

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.config.layer_norm_epsilon) * self.weights[name]

    def attention(self, x: torch.Tensor, name: str) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.config.n_head, self.config.head_dim).transpose(
                1, 2
            )  # [B, n_head, T, head_dim]
            for part in self.linear(x, name + ".c_attn").split(width, dim=-1)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.config.head_dim)
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return self.linear((weights @ v).transpose(1, 2).reshape(batch, length, width), name + ".c_proj")

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        h = self.linear(x, name + ".c_fc")
        return self.linear(h * torch.sigmoid(1.702 * h), name + ".c_proj")

    def embed(self, tokens: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
        """[B, (prompt_length +) T, n_embd]: prompt words, then start, x₀ … x_{T−2}: the inputs that score x₀ …
        x_{T−1}."""
        start = torch.full_like(tokens[:, :1], self.config.start_token)
        inputs = torch.cat([start, tokens[:, :-1]], dim=1)
        x = self.weights["transformer.wte.weight"][inputs] + self.weights["transformer.wpe.weight"][: tokens.shape[1]]
        if prompt is None:
            return x
        words = self.weights["prompt.wte.weight"][prompt] + self.weights["prompt.wpe.weight"]
        return torch.cat([words, x], dim=1)

    @undisturbed
    def hidden(self, tokens: torch.Tensor, layer: int, prompt: torch.Tensor | None = None) -> torch.Tensor:
        tokens, prompt = tokens.to(self.device), None if prompt is None else prompt.to(self.device)
        x = self.embed(tokens, prompt)
        for i in range(layer):
            block = f"transformer.h.{i}"
            x = x + self.attention(self.norm(x, block + ".ln_1.weight"), block + ".attn")
            x = x + self.mlp(self.norm(x, block + ".ln_2.weight"), block + ".mlp")
        last = layer == self.config.n_layer
        x = self.norm(x, "transformer.ln_f.weight" if last else f"transformer.h.{layer}.ln_1.weight")
        return finite(x[:, x.shape[1] - tokens.shape[1] :], self)

    @undisturbed
    def logits(self, tokens: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        return finite(self.hidden(tokens, self.config.n_layer, prompt) @ self.weights["lm_head.weight"].T, self)

    @undisturbed
    def fill(self, job: Job, on_row: OnRow | None = None) -> Filled:
        tokens, index = job.tokens.to(self.device, copy=True), job.index.to(self.device)
        drawn = tokens < 0
        for position in range(self.config.n_pixels):
            if drawn[:, position].any():
                logits = self.logits(tokens[:, : position + 1], job.prompt)[:, -1]
                if job.drawing.guidance_scale is not None:
                    without = self.logits(tokens[:, : position + 1])[:, -1]
                    logits = guide(logits, without, job.drawing.guidance_scale)
                new = draw(logits, index, torch.tensor(position, device=self.device), job.drawing)
                tokens[:, position] = torch.where(drawn[:, position], new, tokens[:, position])
            row, column = divmod(position + 1, self.config.width)
            if on_row is not None and column == 0:
                on_row(range(len(tokens)), row - 1, tokens[:, position + 1 - self.config.width : position + 1].cpu())
        return Filled(tokens.cpu(), drawn.cpu())

    def max_batch(self, job: Job) -> int:
        return len(job.tokens)

    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        """Without a cache a pass reads everything before it again."""
        tokens = torch.zeros(n, min(position + window, self.config.n_pixels), dtype=torch.int64, device=self.device)
        index = torch.arange(n, device=self.device)[:, None]
        places = torch.arange(position, tokens.shape[1], device=self.device)

        def run() -> None:
            draw(self.logits(tokens)[:, position:], index, places, Drawing())

        return run
