"""The strong plain-PyTorch baseline: a static cache, SDPA, and one compiled step per token replayed as a CUDA graph.

This is what a good engineer writes in an afternoon without kernels of their own: torch.compile with
mode="reduce-overhead" over a step that contains everything, sampling included, so that nothing synchronises. The cache
is read in full at every step under a mask: slicing it to the position would recompile, and buckets of lengths would
multiply the minutes of compiling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastigpt.config import ImageGPTConfig


class StaticCacheModel:
    """n images at once, all at one position. weights: as an engine takes them."""

    def __init__(
        self,
        config: ImageGPTConfig,
        weights: dict[str, torch.Tensor],
        n: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        compiled: bool = True,
    ) -> None:
        self.config, self.n, self.device, self.dtype = config, n, torch.device(device), dtype
        self.weights = {
            name: (x.T if ".h." in name and x.ndim == 2 else x).to(self.device, dtype).contiguous()
            for name, x in weights.items()
        }
        shape = (config.n_layer, 2, n, config.n_head, config.n_pixels, config.head_dim)
        self.cache = torch.zeros(shape, device=self.device, dtype=dtype)
        self.slots = torch.arange(config.n_pixels, device=self.device)
        self.run = torch.compile(self.step, mode="reduce-overhead", fullgraph=True) if compiled else self.step

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name], self.config.layer_norm_epsilon)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def logits(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """float32 [n, n_colors]. tokens: int64 [n], the inputs at position, int64 [1]."""
        config, w = self.config, self.weights
        x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][position]
        mask = (self.slots <= position)[None, None, None]
        for i in range(config.n_layer):
            block = f"transformer.h.{i}"
            qkv = self.linear(self.norm(x, block + ".ln_1.weight"), block + ".attn.c_attn")
            q, k, v = qkv.view(self.n, 3, config.n_head, 1, config.head_dim).unbind(1)
            self.cache[i, 0].index_copy_(2, position, k)
            self.cache[i, 1].index_copy_(2, position, v)
            y = F.scaled_dot_product_attention(q, self.cache[i, 0], self.cache[i, 1], attn_mask=mask)
            x = x + self.linear(y.reshape(self.n, config.n_embd), block + ".attn.c_proj")
            h = self.linear(self.norm(x, block + ".ln_2.weight"), block + ".mlp.c_fc")
            x = x + self.linear(h * torch.sigmoid(1.702 * h), block + ".mlp.c_proj")
        return F.linear(self.norm(x, "transformer.ln_f.weight"), w["lm_head.weight"]).float()

    def step(self, tokens: torch.Tensor, position: torch.Tensor, greedy: bool = False) -> torch.Tensor:
        """int64 [n]: the next tokens, drawn at temperature 1 by exponential noise, or the most likely."""
        logits = self.logits(tokens, position)
        if greedy:
            return logits.argmax(-1)
        return (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)

    @torch.inference_mode()
    def sample(self, length: int | None = None, greedy: bool = False) -> torch.Tensor:
        """int64 [n, length] (None: all pixels), without a synchronisation before the end."""
        length = length or self.config.n_pixels
        out = torch.empty(self.n, length, dtype=torch.int64, device=self.device)
        tokens = torch.full((self.n,), self.config.start_token, device=self.device)
        for i in range(length):
            torch.compiler.cudagraph_mark_step_begin()
            tokens = self.run(tokens, self.slots[i : i + 1], greedy).clone()
            out[:, i] = tokens
        return out
