"""The engine of any torch device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch

from fastigpt.engine import Engine, Window, check_window
from fastigpt.engine.arithmetic import checked_dtypes, finite, undisturbed
from fastigpt.engine.memory import free_memory
from fastigpt.engine.portable.blocks import Blocks, Cache
from fastigpt.engine.portable.session import PortableSession
from fastigpt.engine.window import WIDTHS, WindowStatistics, WindowTuner
from fastigpt.sampling import Drawing, draw
from fastigpt.spec import ModelSpec

_MEMORY_SHARE = 0.6  # of the free memory, for the caches and the activations of a session


class PortableEngine:
    """float32, bfloat16 or float16; the cache has the same dtype. `weights`: tensors named and shaped as
    spec.weight_shapes() says, and any of spec.bias_shapes()."""

    name = "portable"

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
        best = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        allowed = (torch.float32, torch.bfloat16, torch.float16)
        self.dtype, self.kv_dtype = checked_dtypes(self.name, dtype or best, kv_dtype, allowed)
        self.blocks = Blocks(spec, weights, self.device, self.dtype)
        # What sessions found out about windows, by who guesses and by how many canvases are drawn side by side.
        self._windows: WeakKeyDictionary[Blocks, dict[int, WindowStatistics]] = WeakKeyDictionary()

    @undisturbed
    def hidden(self, tokens: torch.Tensor, layer: int, prefix: torch.Tensor | None = None) -> torch.Tensor:
        last = layer == self.spec.n_layer
        x = self._whole(tokens, prefix, layer)
        return finite(self.blocks.norm(x, "norm" if last else f"blocks.{layer}.norm_1").float(), self)

    @undisturbed
    def logits(self, tokens: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        return finite(self.blocks.head(self._whole(tokens, prefix, self.spec.n_layer)), self)

    def _whole(self, tokens: torch.Tensor, prefix: torch.Tensor | None, n_layer: int) -> torch.Tensor:
        """[B, T, width]: after n_layer blocks, the hidden states that score these tokens."""
        if prefix is None:
            prefix = self.spec.prefix_rows([self.spec.unconditional]).expand(len(tokens), -1)
        inputs = tokens[:, :-1].to(self.device) + self.spec.n_prefix_tokens
        ids = torch.cat([prefix.to(self.device), inputs], 1)
        lengths = torch.full((len(ids),), prefix.shape[1], device="cpu")
        x = self.blocks.step(ids, torch.zeros_like(lengths), lengths, n_layer=n_layer)
        return x[:, prefix.shape[1] - 1 :]

    def open(self, capacity: int, *, window: Window = "auto", draft: Engine | None = None) -> PortableSession:
        width = check_window(window, self.spec)
        guesser = None if draft is None else self._drafting(draft)
        seen = self._windows.setdefault(guesser or self.blocks, {}).setdefault(capacity, WindowStatistics())
        return PortableSession(self.blocks, capacity, WindowTuner(width, seen), guesser)

    def _drafting(self, draft: Engine) -> Blocks:
        if not isinstance(draft, PortableEngine):
            raise ValueError(f"the portable engine takes drafts from portable engines, not from {draft.name}")
        mine, theirs = ((s.height, s.columns, s.n_tokens) for s in (self.spec, draft.spec))
        if mine != theirs:
            raise ValueError(f"draft draws {theirs} (height, columns, tokens), this model {mine}")
        return draft.blocks

    def room(self, *, guided: bool, window: Window = "auto", draft: Engine | None = None) -> int:
        width = check_window(window, self.spec) or max(WIDTHS)
        bytes_of_a_slot = sum(
            (2 if guided else 1) * (_cache_bytes(blocks) + _activation_bytes(blocks.spec, width))
            for blocks in ([self.blocks] if draft is None else [self.blocks, self._drafting(draft)])
        )
        return max(1, int(_MEMORY_SHARE * free_memory(self.device) / bytes_of_a_slot))

    def enough(self, *, guided: bool) -> int | None:
        return None

    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        length = len(self.spec.unconditional)
        first = torch.full((n,), position + length - 1, device="cpu")
        lengths = torch.full_like(first, length)
        cache = Cache(self.blocks, n, position + length + window)
        cache.keys.normal_()
        cache.values.normal_()
        ids = torch.zeros(n, window, dtype=torch.int64, device=self.device)
        index = torch.arange(n, device=self.device)[:, None]
        places = torch.arange(window, device=self.device) + position

        @torch.inference_mode()
        def run() -> None:
            draw(self.blocks.head(self.blocks.step(ids, first, lengths, cache)), index, places, Drawing())

        return run


def _cache_bytes(blocks: Blocks) -> int:
    spec, block = blocks.spec, blocks.spec.block
    return 2 * spec.n_layer * (spec.context + 1) * block.n_kv_head * block.head_dim * blocks.dtype.itemsize


def _activation_bytes(spec: ModelSpec, width: int) -> int:
    """Of a pass over this many tokens of a canvas."""
    return 8 * width * (spec.block.n_inner + spec.context * spec.block.n_head) * 4
