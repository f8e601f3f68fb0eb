"""The Image GPT as a trainable torch module.

Parameters carry the names and shapes of `ImageGPTConfig.tensor_shapes()` (linear weights stored [in, out], no biases),
so that the state dict is the checkpoint. Formulas: OpenAI's image-gpt (norm without mean, x · sigmoid(1.702 x)).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastigpt.families.image_gpt.config import ImageGPTConfig
from fastigpt.formulas import quick_gelu, rms_norm

_BLOCK = 272  # queries of a block of attention on a CPU: a quarter of 16 words, the start and 1,023 pixels, or more


class Network(nn.Module):
    """Sequence read: [prompt words (none, or all `prompt_length` slots), start, x₀, x₁, …]."""

    def __init__(self, config: ImageGPTConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.transformer = Trunk(config)
        self.lm_head = nn.Linear(config.n_embd, config.n_colors, bias=False, dtype=torch.float32)
        self.prompt = Embeddings(config.n_words, config.prompt_length, config.n_embd) if config.n_words else None
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        """GPT-2's: normal(0, 0.02), projections into the residual stream scaled by 1/√(2 · layers), norms one."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
                continue
            into_residual = name.endswith("c_proj.weight")
            scale = 1 / math.sqrt(2 * self.config.n_layer) if into_residual else 1.0
            nn.init.normal_(parameter, std=0.02 * scale, generator=generator)

    def forward(self, tokens: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, n_colors]: [:, i] scores token i given tokens[:, :i] and the prompt.

        tokens: int64 [B, T], 1 ≤ T ≤ n_pixels (the last one is never read). prompt: int64 [B, prompt_length] or None.
        """
        start = tokens.new_full((tokens.shape[0], 1), self.config.start_token)
        read = torch.cat([start, tokens[:, :-1]], dim=1)
        x = self.transformer.wte(read) + self.transformer.wpe.weight[: read.shape[1]]
        if prompt is not None:
            assert self.prompt is not None, "the model reads no prompt"
            x = torch.cat([self.prompt.wte(prompt) + self.prompt.wpe.weight, x], dim=1)
        for block in self.transformer.h:
            x = block(x)
        x = x[:, -tokens.shape[1] :]
        return self.lm_head(self.transformer.ln_f(x))

    def loss(self, tokens: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        """Mean nats per token of a batch, a float32 scalar."""
        return F.cross_entropy(self(tokens, prompt).float().flatten(0, 1), tokens.flatten())


class Embeddings(nn.Module):
    """Learned vectors of tokens and of positions."""

    def __init__(self, n_tokens: int, n_positions: int, width: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(n_tokens, width, dtype=torch.float32)
        self.wpe = nn.Embedding(n_positions, width, dtype=torch.float32)


class Trunk(Embeddings):
    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__(config.n_colors + 1, config.n_pixels, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = Norm(config.n_embd, config.layer_norm_epsilon)


class Block(nn.Module):
    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        self.ln_1 = Norm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = Norm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Attention(nn.Module):
    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.c_attn(x).view(batch, length, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        attend = _attend_in_blocks if x.device.type == "cpu" else _attend
        y = attend(q, k, v)
        return self.c_proj(y.transpose(1, 2).reshape(batch, length, width))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _attend_in_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention as plain matrix products, a block of queries at a time, scores in float32.

    On CPUs the products run at the machine's peak and what is above the diagonal is mostly left out, which
    scaled_dot_product_attention's backward pass does not reach: a step takes 0.86 of the time (width 192, bfloat16).
    """
    length = q.shape[2]
    q = q * q.shape[-1] ** -0.5
    rows = []
    for first in range(0, length, _BLOCK):
        end = min(length, first + _BLOCK)
        scores = q[:, :, first:end] @ k[:, :, :end].transpose(-1, -2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        position = torch.arange(first, end, device=q.device)[:, None]
        later = torch.arange(end, device=q.device) > position
        rows.append(scores.masked_fill(later, -math.inf).softmax(-1).to(v.dtype) @ v[:, :, :end])
    return torch.cat(rows, 2)


class MLP(nn.Module):
    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.inner)
        self.c_proj = Linear(config.inner, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(quick_gelu(self.c_fc(x)))


class Linear(nn.Module):
    """x @ weight, with the weight stored [in, out] as in the checkpoints."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Norm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.epsilon)
