"""The GPU engine: Triton kernels driven by CUDA graphs. Position, tokens and noise counters live on the device.

A pass scores a window of W tokens per image in five launches per layer and one for the head. Each kernel reads how
far its image has come from the device, so one graph of a row's worth of passes serves every row of every job of a
shape, and nothing has to be bucketed by length. Prefixes that images share are prefilled and stored once. In Triton's
interpreter the same code runs on the CPU, with direct launches where a GPU replays graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fastigpt.config import ImageGPTConfig
from fastigpt.engine import Drawing, Filled, Job, OnRow
from fastigpt.engine.arithmetic import check_filled, converted, finite, undisturbed
from fastigpt.engine.memory import free_memory
from fastigpt.engine.triton_session import Session, Shape
from fastigpt.engine.window import WIDTHS
from fastigpt.kernels import launch
from fastigpt.kernels.causal_attention import causal_attention
from fastigpt.kernels.norm_linear import norm_linear, rms_norm
from fastigpt.kernels.sample_head import Head
from fastigpt.locks import Lock

_SEQUENCE_ROWS = 32768  # tokens that are scored or prefilled at once: bounds the activations
_MEMORY_SHARE = 0.85  # of the free memory, for the caches of a wave
_IDLE_SESSIONS = 2  # shapes of jobs whose buffers and graphs are kept


@dataclass(frozen=True)
class Block:
    """Weights of one block: gains and biases float32, linears [out, in]."""

    ln_1: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    proj: torch.Tensor
    proj_bias: torch.Tensor | None
    ln_2: torch.Tensor
    fc: torch.Tensor
    fc_bias: torch.Tensor | None
    out: torch.Tensor
    out_bias: torch.Tensor | None


class TritonEngine:
    """bfloat16 (the default), float16 or float32; kv_dtype: the same, or int8 or float8_e4m3fn with scales.

    configs: name of a file in kernels/configs; None = the GPU's family. "fixed" has one configuration for all sizes, so
    that an image's tokens depend neither on the batch nor on the window, bit for bit.
    Weights as in ReferenceEngine. Raises ValueError if the device or a dtype cannot be used.
    """

    name = "triton"

    def __init__(
        self,
        config: ImageGPTConfig,
        weights: dict[str, torch.Tensor],
        *,
        device: torch.device | str = "cuda",
        dtype: torch.dtype | None = None,
        kv_dtype: torch.dtype | None = None,
        configs: str | None = None,
    ) -> None:
        self.config, self.device = config, torch.device(device)
        reason = launch.why_unavailable(self.device)
        if reason is not None:
            raise ValueError(f"the triton engine cannot run: {reason}")
        self.dtype = dtype or (torch.float32 if launch.interpreting() else torch.bfloat16)
        self.kv_dtype = kv_dtype or self.dtype
        if self.dtype not in launch.PLAIN_TYPES:
            raise ValueError(f"the triton engine runs in bfloat16, float16 or float32, not {self.dtype}")
        if launch.interpreting() and self.dtype == torch.bfloat16:
            raise ValueError("Triton's interpreter computes bfloat16 wrongly: dtype must be float32 or float16 there")
        if self.kv_dtype not in (self.dtype, *launch.SCALED_TYPES):
            raise ValueError(f"kv_dtype must be {self.dtype}, int8 or float8_e4m3fn, not {self.kv_dtype}")
        if self.kv_dtype == torch.float8_e4m3fn and not launch.stores_float8(self.device):
            raise ValueError("kv_dtype float8_e4m3fn needs an NVIDIA GPU of compute capability 8.9 or later")
        self.configs = launch.table(configs or launch.family(self.device))

        def load(name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
            return converted(name, weights[name], self.device, dtype or self.dtype).contiguous()

        def linear(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
            bias = load(name + ".bias", torch.float32) if name + ".bias" in weights else None
            return converted(name + ".weight", weights[name + ".weight"], self.device, self.dtype).T.contiguous(), bias

        self.blocks = []
        for i in range(config.n_layer):
            name = f"transformer.h.{i}."
            self.blocks.append(
                Block(
                    load(name + "ln_1.weight", torch.float32),
                    *linear(name + "attn.c_attn"),
                    *linear(name + "attn.c_proj"),
                    load(name + "ln_2.weight", torch.float32),
                    *linear(name + "mlp.c_fc"),
                    *linear(name + "mlp.c_proj"),
                )
            )
        self.head = Head(
            load("transformer.ln_f.weight", torch.float32),
            load("lm_head.weight"),
            load("transformer.wte.weight"),
            load("transformer.wpe.weight"),
            config.layer_norm_epsilon,
        )
        self.words = (load("prompt.wte.weight"), load("prompt.wpe.weight")) if config.n_words else None
        self.lock = Lock()
        self._idle: dict[Shape, Session] = {}  # oldest first

    def _device_guard(self) -> AbstractContextManager[object]:
        # Triton launches on the current device, whatever its arguments are on.
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    # --- whole sequences: scoring and prefill ------------------------------------------------------------------------

    def embed(self, tokens: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
        """float32 [B, (prompt_length +) T, n_embd]: words, start, x₀ … x_{T−2}. tokens: [B, T], on the device."""
        start = torch.full_like(tokens[:, :1], self.config.start_token)
        inputs = torch.cat([start, tokens[:, :-1]], 1)
        x = self.head.wte[inputs].float() + self.head.wpe[: tokens.shape[1]].float()
        if prompt is None or self.words is None:
            return x
        words = self.words[0][prompt].float() + self.words[1].float()
        return torch.cat([words, x], 1)

    def sequence(
        self, x: torch.Tensor, n_layer: int, store: Session | None = None, first_source: int = 0
    ) -> torch.Tensor:
        """Runs whole sequences x [B, T, n_embd] through `n_layer` blocks, in place; keys and values go into the
        prefix of sources first_source … of `store`."""
        config = self.config
        batch, length, width = x.shape
        rows = x.view(batch * length, width)
        qkv = torch.empty((len(rows), 3 * width), dtype=self.dtype, device=self.device)
        inner = torch.empty((len(rows), config.inner), dtype=self.dtype, device=self.device)
        attended = torch.empty((batch, length, config.n_head, config.head_dim), dtype=self.dtype, device=self.device)
        shared: dict[str, Any] = {"configs": self.configs, "epsilon": config.layer_norm_epsilon}
        for i, block in enumerate(self.blocks[:n_layer]):
            norm_linear(rows, block.qkv, qkv, gain=block.ln_1, bias=block.qkv_bias, **shared)
            q, k, v = qkv.view(batch, length, 3, config.n_head, config.head_dim).unbind(2)
            if store is not None:
                store.append_prefix(i, first_source, k, v)
                if i == config.n_layer - 1:
                    break  # nobody reads what comes after the last keys
            causal_attention(q, k, v, configs=self.configs, out=attended)
            norm_linear(attended.view(-1, width), block.proj, rows, bias=block.proj_bias, residual=True, **shared)
            norm_linear(rows, block.fc, inner, gain=block.ln_2, bias=block.fc_bias, gelu=True, **shared)
            norm_linear(inner, block.out, rows, bias=block.out_bias, residual=True, **shared)
        return x

    def _score(self, tokens: torch.Tensor, prompt: torch.Tensor | None, n_layer: int) -> torch.Tensor:
        """Hidden states float32 [B, T, n_embd] after `n_layer` blocks, some sequences at a time."""
        length = tokens.shape[1] + (0 if prompt is None else prompt.shape[1])
        at_once = max(1, _SEQUENCE_ROWS // length)
        parts = []
        for first in range(0, len(tokens), at_once):
            some = slice(first, first + at_once)
            words = None if prompt is None else prompt[some].to(self.device)
            x = self.sequence(self.embed(tokens[some].to(self.device), words), n_layer)
            parts.append(x[:, length - tokens.shape[1] :])
        return torch.cat(parts).contiguous()

    @undisturbed
    def hidden(self, tokens: torch.Tensor, layer: int, prompt: torch.Tensor | None = None) -> torch.Tensor:
        with self.lock, self._device_guard():
            x = self._score(tokens, prompt, layer)
            gain = self.head.gain if layer == self.config.n_layer else self.blocks[layer].ln_1
            rows = x.view(-1, x.shape[-1])
            states = rms_norm(rows, gain, torch.empty_like(rows), self.config.layer_norm_epsilon).view_as(x)
            return finite(states, self)

    @undisturbed
    def logits(self, tokens: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        with self.lock, self._device_guard():
            x = self._score(tokens, prompt, self.config.n_layer)
            out = torch.empty((*x.shape[:2], self.config.n_colors), dtype=torch.float32, device=self.device)
            norm_linear(
                x.view(-1, x.shape[-1]), self.head.weight, out.view(-1, self.config.n_colors), configs=self.configs,
                gain=self.head.gain, epsilon=self.config.layer_norm_epsilon,
            )  # fmt: skip
            return finite(out, self)

    # --- filling -----------------------------------------------------------------------------------------------------

    @undisturbed
    def fill(self, job: Job, on_row: OnRow | None = None) -> Filled:
        with self.lock, self._device_guard():
            shape = Shape.of(self.config, job)
            # Taken out while in use: a callback that fills as well gets a session of its own.
            session = self._idle.pop(shape, None)
            if session is None:
                self._make_room(shape)
                session = Session(self, shape)
            try:
                filled = session.fill(job, on_row)
                # Of bfloat16 and float32 the weights tell (fastigpt/overflow.py); float16 ends at 65,504.
                return check_filled(self, job, filled) if self.dtype == torch.float16 else filled
            finally:
                self._idle[shape] = session
                while len(self._idle) > _IDLE_SESSIONS:
                    self._forget_oldest()

    def _make_room(self, shape: Shape) -> None:
        while self._idle and shape.bytes(self) > _MEMORY_SHARE * free_memory(self.device):
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        self._idle.pop(next(iter(self._idle))).release()

    @torch.inference_mode()
    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        with self.lock, self._device_guard():
            tokens = torch.full((n, self.config.n_pixels), -1, device="cpu")
            index = torch.arange(n, device="cpu")
            job = Job(tokens, index, torch.zeros_like(index), None, Drawing(), window)
            session = Session(self, Shape.of(self.config, job))
            run = session.rehearsal(job, position, window)

        def one_pass(engine: TritonEngine = self) -> None:  # a session holds its engine weakly
            run()

        return one_pass

    def max_batch(self, job: Job) -> int:
        with self.lock, self._device_guard():
            found = Shape.of(self.config, job)
            free = free_memory(self.device) + sum(idle.bytes(self) for idle in self._idle)
            widest = max(WIDTHS) if job.window == "auto" else int(job.window)
            plans = [(self, found.plan, widest)]
            plans += [] if found.draft is None else [(*found.draft, 1)]
            sizes = [plan.bytes_shared_and_each(engine, width) for engine, plan, width in plans]
            shared, each = (sum(part) for part in zip(*sizes))
            return max(1, int((_MEMORY_SHARE * free - shared) / each))
