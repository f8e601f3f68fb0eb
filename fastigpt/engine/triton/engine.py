"""The engine of fastigpt/engine/__init__.py's protocol, on Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fastigpt.engine import Engine, Window, check_window
from fastigpt.engine.arithmetic import checked_dtypes
from fastigpt.engine.memory import free_memory
from fastigpt.engine.triton import sequence
from fastigpt.engine.triton.batch import Batch, batch_bytes, bucket
from fastigpt.engine.triton.graphs import capture, launching
from fastigpt.engine.triton.pool import MEMORY_SHARE, Pool
from fastigpt.engine.triton.session import TritonSession
from fastigpt.engine.triton.weights import Model, load
from fastigpt.engine.window import WIDTHS
from fastigpt.kernels import launch
from fastigpt.kernels.norm_linear import norm_linear, rms_norm
from fastigpt.kernels.sample_head import hidden_layer
from fastigpt.spec import ModelSpec

_WIDEST = WIDTHS[-1]  # wider windows keep no more tokens, and a program would hold more rows than its GPU has room for


class TritonEngine:
    """bfloat16 (the default), float16 or float32, or int8: the blocks' linear layers with a scale for each output, all
    else in the default. kv_dtype: the same (with int8 the default), or int8 or float8_e4m3fn with scales.

    configs: a table, or the name of a file in kernels/configs; None = the GPU's family. With any of them an image's
    tokens depend neither on the batch nor on the window, bit for bit; with "fixed", which has one configuration for all
    sizes and leaves nothing to cuBLAS, the logits of whole sequences depend on no other sequence either.
    Weights as in ReferenceEngine. Raises ValueError if the device or a dtype cannot be used.
    """

    name = "triton"

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, torch.Tensor],
        *,
        device: torch.device | str = "cuda",
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        configs: str | launch.Table | None = None,
    ) -> None:
        self.spec, self.device = spec, torch.device(device)
        reason = launch.why_unavailable(self.device)
        if reason is not None:
            raise ValueError(f"the triton engine cannot run: {reason}")
        best = torch.float32 if launch.interpreting() else torch.bfloat16
        self.dtype, _ = checked_dtypes(self.name, dtype or best, None, (*launch.PLAIN_TYPES, torch.int8))
        computed, self.kv_dtype = checked_dtypes(
            self.name, best if self.dtype == torch.int8 else self.dtype, kv_dtype, launch.PLAIN_TYPES,
            launch.SCALED_TYPES,
        )  # fmt: skip
        if launch.interpreting() and self.dtype == torch.bfloat16:
            raise ValueError("Triton's interpreter computes bfloat16 wrongly: dtype must be float32 or float16 there")
        if self.kv_dtype == torch.float8_e4m3fn and not launch.stores_float8(self.device):
            raise ValueError("kv_dtype float8_e4m3fn needs an NVIDIA GPU of compute capability 8.9 or later")
        table = configs if isinstance(configs, dict) else launch.table(configs or launch.family(self.device))
        quantized = self.dtype == torch.int8
        self.model: Model = load(spec, weights, self.device, computed, self.kv_dtype, table, quantized)
        self._pool = Pool(self.model)

    # --- whole sequences ---------------------------------------------------------------------------------------------

    def _score(self, tokens: torch.Tensor, prefix: torch.Tensor | None, n_layer: int) -> torch.Tensor:
        if prefix is None:
            prefix = torch.tensor([self.spec.unconditional], device=self.device).expand(len(tokens), -1)
        return sequence.score(self.model, tokens, prefix, n_layer)

    def hidden(self, tokens: torch.Tensor, layer: int, prefix: torch.Tensor | None = None) -> torch.Tensor:
        with launching(self.device):
            x = self._score(tokens, prefix, layer)
            last = layer == self.spec.n_layer
            gain = self.model.head.gain if last else self.model.blocks[layer].norm_1
            rows = x.view(-1, x.shape[-1])
            return rms_norm(rows, gain, torch.empty_like(rows), self.model.epsilon).view_as(x)

    def logits(self, tokens: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        with launching(self.device):
            x, head, configs = self._score(tokens, prefix, self.spec.n_layer), self.model.head, self.model.configs
            out = torch.empty((*x.shape[:2], self.spec.n_tokens), dtype=torch.float32, device=self.device)
            rows = x.view(-1, x.shape[-1])
            gain: torch.Tensor | None = head.gain
            if head.inner_weight is not None:
                hidden = torch.empty((len(rows), len(head.inner_weight)), dtype=self.model.dtype, device=self.device)
                rows, gain = hidden_layer(rows, head, hidden, configs), None
            norm_linear(
                rows, head.weight, out.view(-1, self.spec.n_tokens), configs=configs, gain=gain, bias=head.bias,
                epsilon=self.model.epsilon,
            )  # fmt: skip
            return out

    # --- drawing -----------------------------------------------------------------------------------------------------

    def open(self, capacity: int, *, window: Window = "auto", draft: Engine | None = None) -> TritonSession:
        return TritonSession(self._pool, capacity, self._window(window), _model_of(draft))

    def _window(self, window: Window) -> int | None:
        width = check_window(window, self.spec)
        return None if width is None else min(width, _WIDEST)

    def room(self, *, guided: bool, window: Window = "auto", draft: Engine | None = None) -> int:
        width, drafting = self._window(window), _model_of(draft)
        widths = WIDTHS if width is None else (width,)

        def needed(n: int) -> float:
            found = batch_bytes(self.model, n, guided, widths)
            return found if drafting is None or width == 1 else found + batch_bytes(drafting, n, guided, (1,))

        free = MEMORY_SHARE * (free_memory(self.device) + self._pool.idle_bytes(widths))
        n = max(1, int((free - needed(0)) / (needed(64) - needed(0)) * 64))
        while n > 1 and bucket(n) > n:  # a session takes whole buckets
            n -= 1
        return n

    def enough(self, *, guided: bool) -> int | None:
        return None

    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        batch, width = Batch(self.model, bucket(n)), self._window(window)
        assert width is not None
        with launching(self.device):
            canvases, cache = batch.seats.canvases, batch.seats.cache
            for i in range(self.spec.n_layer):
                for x in cache.layer(i):
                    if x is not None:
                        x.copy_(torch.ones((), device=x.device).expand(x.shape))
            canvases.position[:n] = position
            canvases.end[:n] = self.spec.n_positions
            canvases.offset.fill_(1 - len(self.spec.unconditional))
            batch.settle()
            start, slots = canvases.position.clone(), canvases.slots.clone()
            passes = batch.passes_of(width)
            passes.enter(None, torch.ones(batch.n, dtype=torch.bool, device=self.device))

            def one_pass() -> None:
                canvases.position.copy_(start)
                canvases.slots.copy_(slots)
                canvases.canvas.fill_(-1)
                passes.one_pass(batch.kind)

            if batch.stream is None:
                graph = None
            else:
                passes.rehearse(lambda: passes.one_pass(batch.kind))
                graph = capture(one_pass, batch.stream)

        def run(engine: TritonEngine = self) -> None:
            with launching(engine.device):
                if graph is None:
                    one_pass()
                else:
                    graph.replay()  # a graph knows addresses only: `one_pass` keeps what is there

        return run


def _model_of(draft: Engine | None) -> Model | None:
    if draft is None:
        return None
    if not isinstance(draft, TritonEngine):
        raise ValueError(f"the triton engine takes drafts from triton engines, not from {draft.name}")
    return draft.model
