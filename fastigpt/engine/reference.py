"""The truth: a model in plain PyTorch, without a cache, that every other engine is tested against.

Follows OpenAI's src/model.py (github.com/openai/image-gpt): pre-norm blocks, norm without mean or bias, no causal look
at the last pixel; and Llama's blocks, as spec.py describes both. Slow on purpose: each token is drawn after running the
whole sequence again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fastigpt.engine import Advance, Engine, Window, check_window
from fastigpt.engine.arithmetic import checked_dtypes, converted, finite, undisturbed
from fastigpt.formulas import causal_attention, gated_silu, quick_gelu, rms_norm, rotate
from fastigpt.job import Filled, Request
from fastigpt.sampling import Drawing, draw, guide
from fastigpt.spec import ROTARY, ModelSpec


class ReferenceEngine:
    """float32 or float64, any torch device. `weights`: tensors named and shaped as spec.weight_shapes() says, and any
    of spec.bias_shapes()."""

    name = "reference"

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.spec, self.device = spec, torch.device(device)
        allowed = (torch.float32, torch.float64)
        self.dtype, self.kv_dtype = checked_dtypes(self.name, dtype or torch.float32, kv_dtype, allowed)
        self.weights = {name: converted(name, w, self.device, self.dtype) for name, w in weights.items()}

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """[..., in] → [..., out]; weights are [out, in]."""
        y = x @ self.weights[name + ".weight"].T
        bias = self.weights.get(name + ".bias")
        return y if bias is None else y + bias

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, self.weights[name], self.spec.block.norm_epsilon)

    def attention(self, x: torch.Tensor, name: str, turns: torch.Tensor | None) -> torch.Tensor:
        """turns: [T, head_dim / 2, 2], of rotary positions."""
        block = self.spec.block
        q, k, v = (
            part.unflatten(-1, (-1, block.head_dim)).transpose(1, 2)  # [B, n_head or n_kv_head, T, head_dim]
            for part in self.linear(x, name + ".qkv").split(block.sections, dim=-1)
        )
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        k, v = (part.repeat_interleave(block.n_head // block.n_kv_head, dim=1) for part in (k, v))
        y = causal_attention(q, k, v)
        return self.linear(y.transpose(1, 2).flatten(2), name + ".proj")

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        h = self.linear(x, name + ".fc")
        h = quick_gelu(h) if self.spec.block.mlp == "quick_gelu" else gated_silu(h)
        return self.linear(h, name + ".out")

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n_tokens] from normed hidden states [..., width]."""
        if self.spec.head_inner is not None:
            x = torch.nn.functional.gelu(self.linear(x, "head.fc"))
        return self.linear(x, "head")

    def embed(self, tokens: torch.Tensor, prefix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, L + T − 1, width]: the prefix, then x₀ … x_{T−2}: the inputs that score x₀ … x_{T−1}, and those
        before. And their rows of the rotary table, if there is one."""
        inputs = self.weights["prefix.embedding"][prefix], self.weights["token.embedding"][tokens[:, :-1]]
        x = torch.cat(inputs, dim=1)
        first = self.spec.position_row(0, prefix.shape[1])
        rows = slice(first, first + x.shape[1])
        if self.spec.positions == "learned":
            return x + self.weights["positions"][rows], None
        return x, self.weights[ROTARY][rows]

    @undisturbed
    def hidden(self, tokens: torch.Tensor, layer: int, prefix: torch.Tensor | None = None) -> torch.Tensor:
        if prefix is None:
            prefix = self.spec.prefix_rows([self.spec.unconditional]).expand(len(tokens), -1)
        tokens, prefix = tokens.to(self.device), prefix.to(self.device)
        x, turns = self.embed(tokens, prefix)
        for i in range(layer):
            block = f"blocks.{i}"
            x = x + self.attention(self.norm(x, block + ".norm_1"), block, turns)
            x = x + self.mlp(self.norm(x, block + ".norm_2"), block)
        x = self.norm(x, "norm" if layer == self.spec.n_layer else f"blocks.{layer}.norm_1")
        return finite(x[:, x.shape[1] - tokens.shape[1] :], self)

    @undisturbed
    def logits(self, tokens: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        return finite(self.head(self.hidden(tokens, self.spec.n_layer, prefix)), self)

    def open(self, capacity: int, *, window: Window = "auto", draft: Engine | None = None) -> ReferenceSession:
        check_window(window, self.spec)
        return ReferenceSession(self, capacity)

    def room(self, *, guided: bool, window: Window = "auto", draft: Engine | None = None) -> int:
        return 64  # without a cache there is nothing to be short of

    def enough(self, *, guided: bool) -> int | None:
        return None

    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        """Without a cache a pass reads everything before it again."""
        length = min(position + window, self.spec.n_positions)
        tokens = torch.zeros(n, length, dtype=torch.int64, device=self.device)
        index = torch.arange(n, device=self.device)[:, None]
        places = torch.arange(position, length, device=self.device)

        def run() -> None:
            draw(self.logits(tokens)[:, position:], index, places, Drawing())

        return run


@dataclass
class _Canvas:
    request: Request
    tokens: torch.Tensor  # int64 [n_positions]
    position: int  # the first that is not decided
    pass_starts: torch.Tensor
    log_likelihood: float = 0.0

    def copy(self, index: int) -> _Canvas:
        request = replace(self.request, index=index)
        return _Canvas(request, self.tokens.clone(), self.position, self.pass_starts.clone(), self.log_likelihood)


class ReferenceSession:
    """One token of every canvas at a time, each canvas alone."""

    def __init__(self, engine: ReferenceEngine, capacity: int) -> None:
        self.engine, self.device, self.capacity = engine, engine.device, capacity
        self._slots: dict[int, _Canvas] = {}

    def add(self, requests: Sequence[Request]) -> list[int]:
        slots = self._free(len(requests))
        for slot, request in zip(slots, requests):
            leading = int((request.tokens >= 0).long().cumprod(0).sum())
            starts = torch.zeros_like(request.tokens, dtype=torch.bool)
            self._slots[slot] = _Canvas(request, request.tokens.clone(), leading, starts)
        return slots

    def _free(self, count: int) -> list[int]:
        free = [slot for slot in range(self.capacity) if slot not in self._slots]
        if len(free) < count:
            raise ValueError(f"{count} canvases for {len(free)} free slots")
        return free[:count]

    @undisturbed
    def step(self, seconds: float) -> list[Advance]:
        for canvas in self._slots.values():
            stop = len(canvas.tokens) if canvas.request.stop is None else canvas.request.stop
            drawn = False
            while canvas.position < stop and not drawn:
                drawn = self._advance(canvas)
            while not canvas.request.score and canvas.position < stop and canvas.tokens[canvas.position] >= 0:
                canvas.position += 1
        return [Advance(slot, canvas.position) for slot, canvas in self._slots.items()]

    def _advance(self, canvas: _Canvas) -> bool:
        """Decides one token; returns whether it was drawn."""
        request, at = canvas.request, canvas.position
        known = int(canvas.tokens[at])
        if known < 0 or request.score:
            given = canvas.tokens[None, : at + 1]
            logits = self.engine.logits(given, self.engine.spec.prefix_rows([request.prefix]))[0, -1]
            if request.negative is not None:
                assert request.drawing.guidance_scale is not None
                without = self.engine.logits(given, self.engine.spec.prefix_rows([request.negative]))[0, -1]
                logits = guide(logits, without, request.drawing.guidance_scale)
            if known >= 0:
                canvas.log_likelihood += float(logits.double().log_softmax(-1)[known])
            else:
                index = torch.tensor([request.index], device=logits.device)
                position = torch.tensor([at], device=logits.device)
                canvas.tokens[at] = int(draw(logits[None], index, position, request.drawing)[0])
                canvas.pass_starts[at] = True
        canvas.position += 1
        return known < 0

    def read(self, slots: Sequence[int]) -> Filled:
        canvases = [self._slots[slot] for slot in slots]
        return Filled(
            torch.stack([canvas.tokens for canvas in canvases]),
            torch.stack([canvas.pass_starts for canvas in canvases]),
            torch.tensor([canvas.log_likelihood for canvas in canvases], dtype=torch.float64, device="cpu"),
        )

    def resume(self, slot: int, stop: int) -> None:
        canvas = self._slots[slot]
        canvas.request = replace(canvas.request, stop=stop)

    def fork(self, slot: int, indices: Sequence[int]) -> list[int]:
        others = self._free(len(indices) - 1)
        canvas = self._slots[slot]
        for other, index in zip(others, indices[1:]):
            self._slots[other] = canvas.copy(index)
        canvas.request = replace(canvas.request, index=indices[0])
        return [slot, *others]

    def remove(self, slot: int) -> None:
        del self._slots[slot]

    def close(self) -> None:
        self._slots.clear()
