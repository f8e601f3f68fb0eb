"""The language model of a Janus, trainable: parameters under the checkpoint's names, the loss of images after
prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from fastigpt.families.janus import JanusConfig, rotary_table


class TrainableJanus(nn.Module):
    """What families/janus.py hands to engines, computed for whole sequences at once."""

    cosines: torch.Tensor
    sines: torch.Tensor

    def __init__(self, config: JanusConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.parameters_by_name = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(_start(name, shape, config, generator))
                for name, shape in config.tensor_shapes().items()
            }
        )
        table = rotary_table(config, config.prompt_length + config.height * config.columns)
        self.register_buffer("cosines", table[..., 0].repeat(1, 2), persistent=False)
        self.register_buffer("sines", table[..., 1].repeat(1, 2), persistent=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """float32, as config.tensor_shapes() says."""
        return {name.replace("/", "."): p.detach().clone() for name, p in self.parameters_by_name.items()}

    def take(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Those of `tensors`, named as in `tensors()`."""
        with torch.no_grad():
            for name, parameter in self.parameters_by_name.items():
                parameter.copy_(tensors[name.replace("/", ".")])

    def matrices(self) -> list[nn.Parameter]:
        """Those of the blocks."""
        return [p for name, p in self.parameters_by_name.items() if "/layers/" in name and p.ndim == 2]

    def others(self) -> list[nn.Parameter]:
        return [p for name, p in self.parameters_by_name.items() if not ("/layers/" in name and p.ndim == 2)]

    def logits(self, prefixes: Sequence[Sequence[int]], tokens: torch.Tensor) -> torch.Tensor:
        """float32 or the autocast's [B, n, n_codes], of each of tokens int64 [B, n] after a prefix and those before
        it."""
        return self._logits(*self.inputs(prefixes, tokens))

    def loss(self, prefixes: Sequence[Sequence[int]], tokens: torch.Tensor) -> torch.Tensor:
        """Nats per token."""
        return self.nats(*self.inputs(prefixes, tokens), tokens)

    def inputs(
        self, prefixes: Sequence[Sequence[int]], tokens: torch.Tensor, longest: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read, int64 [B, longest + n − 1], and the places in it that score tokens int64 [B, n]. Sequences of
        different lengths are padded at their ends, which nothing before them sees. longest: prefix that there is room
        for, None = of these."""
        n, words = tokens.shape[1], self.config.vocabulary
        lengths = torch.tensor([len(prefix) for prefix in prefixes])
        ids = torch.zeros(len(tokens), (longest or int(lengths.max())) + n - 1, dtype=torch.int64)
        for row, prefix, drawn in zip(ids, prefixes, tokens):
            row[: len(prefix)] = torch.tensor(prefix)
            row[len(prefix) : len(prefix) + n - 1] = drawn[:-1] + words
        return ids, (lengths - 1)[:, None] + torch.arange(n)

    def nats(self, ids: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Per token, of `inputs`."""
        return F.cross_entropy(self._logits(ids, places).float().flatten(0, 1), tokens.flatten())

    def _logits(self, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        words = self._p("language_model.embed_tokens.weight")
        x = F.embedding(ids, torch.cat([words, self._token_table()]))
        for i in range(self.config.n_layer):
            x = self._block(x, f"language_model.layers.{i}.")
        x = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
        x = F.gelu(self._linear(self._norm(x, "language_model.norm.weight"), "generation_head.proj_out"))
        return self._linear(x, "generation_head.vision_head")

    def _p(self, name: str) -> torch.Tensor:
        return self.parameters_by_name[name.replace(".", "/")]

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self._p(name + ".weight"), self._p(name + ".bias"))

    def _token_table(self) -> torch.Tensor:
        x = F.linear(
            self._p("generation_embeddings.weight"),
            self._p("generation_aligner.fc1.weight"),
            self._p("generation_aligner.fc1.bias"),
        )
        return self._linear(F.gelu(x), "generation_aligner.hidden_layers.0").float()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self._p(name), self.config.norm_epsilon)

    def _block(self, x: torch.Tensor, layer: str) -> torch.Tensor:
        config, (batch, length, _) = self.config, x.shape
        h = self._norm(x, layer + "input_layernorm.weight")
        q, k, v = (
            F.linear(h, self._p(f"{layer}self_attn.{part}_proj.weight"))
            .view(batch, length, -1, config.head_dim)
            .transpose(1, 2)
            for part in "qkv"
        )
        y = F.scaled_dot_product_attention(
            self._turned(q), self._turned(k), v, is_causal=True, enable_gqa=config.n_kv_head != config.n_head
        )
        x = x + F.linear(y.transpose(1, 2).flatten(2), self._p(layer + "self_attn.o_proj.weight"))
        h = self._norm(x, layer + "post_attention_layernorm.weight")
        gate, up = (F.linear(h, self._p(f"{layer}mlp.{part}_proj.weight")) for part in ("gate", "up"))
        return x + F.linear(F.silu(gate) * up, self._p(layer + "mlp.down_proj.weight"))

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys [B, heads, length, head_dim], each turned by the angle of its position."""
        length, (a, b) = x.shape[2], x.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
        return x * self.cosines[:length].to(x.dtype) + turned * self.sines[:length].to(x.dtype)


def _start(name: str, shape: tuple[int, ...], config: JanusConfig, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.full(shape, 1.0 if "norm" in name else 0.0, dtype=torch.float32)
    scale = shape[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        scale *= (2 * config.n_layer) ** -0.5
    if name.endswith("vision_head.weight"):
        scale *= 0.1
    if name.endswith("embed_tokens.weight"):
        scale = 1.0
    return torch.empty(shape, dtype=torch.float32).normal_(0, scale, generator=generator)
