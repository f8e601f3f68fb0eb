"""The strong plain-PyTorch baseline: a static cache, SDPA, and one compiled step per token.

This is what a good engineer writes in an afternoon without kernels of their own: torch.compile over a step that
contains everything, sampling included, so that nothing synchronises. On a GPU it is replayed as a CUDA graph
(mode="reduce-overhead") and reads the cache in full under a mask: slicing it to the position would recompile, and
buckets of lengths would multiply the minutes of compiling. A CPU has no such graphs, so there the length is a dynamic
size of one compiled step, only the slots in use are read, and the weights are frozen, which lays them out for oneDNN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fastigpt.config import ImageGPTConfig


class StaticCacheModel(nn.Module):
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
        super().__init__()
        self.config, self.n, self.device, self.dtype = config, n, torch.device(device), dtype
        self.weights = nn.ParameterDict(
            {
                _key(name): nn.Parameter(
                    (x.T if ".h." in name and x.ndim == 2 else x).to(self.device, dtype).contiguous(), False
                )
                for name, x in weights.items()
            }
        )
        self.sliced = self.device.type == "cpu"
        # One slot more than is used: a slice that were the whole cache would be compiled for apart.
        shape = (n, config.n_head, config.n_pixels + self.sliced, config.head_dim)
        self.caches = [
            [torch.zeros(shape, device=self.device, dtype=dtype) for _ in range(2)] for _ in range(config.n_layer)
        ]
        self.slots = torch.arange(config.n_pixels, device=self.device)
        self.run: Callable[..., torch.Tensor] = self.step
        if compiled and self.sliced:
            self.run = torch.compile(self.step, fullgraph=True, options={"freezing": True})
        elif compiled:
            self.run = torch.compile(self.step, mode="reduce-overhead", fullgraph=True)

    def weight(self, name: str) -> torch.Tensor | None:
        return self.weights.get(_key(name))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight(name), self.config.layer_norm_epsilon)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weight(name + ".weight"), self.weight(name + ".bias"))

    def logits(self, tokens: torch.Tensor, position: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """float32 [n, n_colors]. tokens: int64 [n], the inputs at position, int64 [1]. slots: 0, 1, …, as many as are
        read."""
        config, end = self.config, slots.shape[0]
        x = self.weight("transformer.wte.weight")[tokens] + self.weight("transformer.wpe.weight")[position]
        mask = None if self.sliced else (slots <= position)[None, None, None]
        for i in range(config.n_layer):
            block = f"transformer.h.{i}"
            qkv = self.linear(self.norm(x, block + ".ln_1.weight"), block + ".attn.c_attn")
            q, k, v = qkv.view(self.n, 3, config.n_head, 1, config.head_dim).unbind(1)
            keys, values = self.caches[i]
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            y = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=mask)
            x = x + self.linear(y.reshape(self.n, config.n_embd), block + ".attn.c_proj")
            h = self.linear(self.norm(x, block + ".ln_2.weight"), block + ".mlp.c_fc")
            x = x + self.linear(h * torch.sigmoid(1.702 * h), block + ".mlp.c_proj")
        return F.linear(self.norm(x, "transformer.ln_f.weight"), self.weight("lm_head.weight")).float()

    def step(
        self, tokens: torch.Tensor, position: torch.Tensor, slots: torch.Tensor, greedy: bool = False
    ) -> torch.Tensor:
        """int64 [n]: the next tokens, drawn at temperature 1 by exponential noise, or the most likely."""
        logits = self.logits(tokens, position, slots)
        if greedy:
            return logits.argmax(-1)
        return (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)

    def next(self, tokens: torch.Tensor, at: int, greedy: bool = False) -> torch.Tensor:
        """The compiled step at position `at`."""
        if self.sliced and at == 0:  # a size of 1 would be compiled for apart as well
            return self.step(tokens, self.slots[:1], self.slots[:1], greedy)
        slots = self.slots[: at + 1] if self.sliced else self.slots
        if self.sliced:
            torch._dynamo.mark_dynamic(slots, 0, min=2, max=self.config.n_pixels)
        torch.compiler.cudagraph_mark_step_begin()
        return self.run(tokens, self.slots[at : at + 1], slots, greedy).clone()

    @torch.no_grad()
    def sample(self, length: int | None = None, greedy: bool = False) -> torch.Tensor:
        """int64 [n, length] (None: all pixels), without a synchronisation before the end."""
        length = length or self.config.n_pixels
        out = torch.empty(self.n, length, dtype=torch.int64, device=self.device)
        tokens = torch.full((self.n,), self.config.start_token, device=self.device)
        for i in range(length):
            tokens = self.next(tokens, i, greedy)
            out[:, i] = tokens
        return out


def _key(name: str) -> str:
    return name.replace(".", "/")  # parameters may not have dots in their names


class StaticCachePeer:
    """As fastigpt.bench.peers.Peer. Compiling is paid when a pass is prepared, once for each n."""

    name = "static cache, torch.compile"
    window, tokens_per_pass = 1, 1.0

    def __init__(
        self, config: ImageGPTConfig, weights: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.weights, self.device, self.dtype, self.kv_dtype = config, weights, device, dtype, dtype
        self.models: dict[int, StaticCacheModel] = {}

    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        if window != 1:
            raise ValueError(f"the static cache decodes one token at a time, not windows of {window}")
        if n not in self.models:
            self.models = {n: StaticCacheModel(self.config, self.weights, n, device=self.device, dtype=self.dtype)}
        model = self.models[n]
        tokens = torch.zeros(n, dtype=torch.int64, device=self.device)

        @torch.no_grad()
        def run() -> None:
            model.next(tokens, position)

        run()
        return run
