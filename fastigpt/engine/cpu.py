"""The CPU engine: csrc/cpu behind the Engine protocol.

Python checks arguments, hands arrays over and reports rows; a whole pass (all layers, filters, draws, the next guesses)
and many passes run in one call, without the GIL. Results are bitwise independent of batch, window, prefix sharing and
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch

from fastigpt import _C
from fastigpt.config import ImageGPTConfig
from fastigpt.engine import Filled, Job, OnRow
from fastigpt.engine.arithmetic import does_not_fit, finite
from fastigpt.engine.memory import free_memory
from fastigpt.errors import NotFiniteError
from fastigpt.operands import readable
from fastigpt.quantize import check_threads

_NUMBERS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "i8"}
_BFLOAT16_OVERFLOWS = np.float32((2 - 2**-8) * 2.0**127)  # halfway between the largest and what would come next
_SMALLEST = 1e-35  # of weights that int8 tells from 0
_SLICE = 0.05  # seconds in C++ before Python looks for signals and finished rows
_MEMORY_SHARE = 0.8  # of the free memory, for the cache of a wave


def default_dtypes(isa: str) -> tuple[torch.dtype, torch.dtype, str]:
    """dtype and kv_dtype of an engine that was not told, and why. `isa`: one of fastigpt._C.supported_isas()."""
    if isa == "avx512vnni":
        return (
            torch.bfloat16,
            torch.bfloat16,
            "AVX512-BF16: half the bytes, twice the rate",
        )
    if isa == "generic":
        return torch.float32, torch.float32, "without AVX2, widening bfloat16 costs more than the bytes it saves"
    return torch.bfloat16, torch.bfloat16, "bfloat16 in memory halves the bytes to read; arithmetic is float32"


class CpuEngine:
    """`weights`: CPU tensors named and shaped as config.tensor_shapes() says, and any of config.bias_shapes().

    dtype: torch.float32, bfloat16 or int8 (weights per output channel and activations per row; embeddings, norms and
    biases stay float32, the head bfloat16). kv_dtype: the same three (int8: a scale for each token and head). isa:
    "auto" or one of fastigpt._C.supported_isas(). threads: None takes torch.get_num_threads().
    """

    name = "cpu"

    def __init__(
        self,
        config: ImageGPTConfig,
        weights: dict[str, torch.Tensor],
        *,
        dtype: torch.dtype | str | None = None,
        kv_dtype: torch.dtype | str | None = None,
        isa: str = "auto",
        threads: int | None = None,
    ) -> None:
        if isa != "auto" and isa not in _C.supported_isas():
            raise ValueError(f"isa must be auto or one of {', '.join(_C.supported_isas())}, not {isa!r}")
        n_threads = check_threads(threads) or min(torch.get_num_threads(), _C.MAX_THREADS)
        self.config, self.device = config, torch.device("cpu")
        self.isa = _C.supported_isas()[-1] if isa == "auto" else isa
        best_dtype, best_kv, self._reason = default_dtypes(self.isa)
        self.dtype = _dtype("dtype", dtype, best_dtype)
        self.kv_dtype = _dtype("kv_dtype", kv_dtype, best_kv if dtype is None else _cache_of(self.dtype))
        if dtype is not None:
            self._reason = "asked for"
        self._model = _C.CpuModel(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_inner=config.inner,
            n_pixels=config.n_pixels,
            columns=config.width,
            n_colors=config.n_colors,
            n_words=config.n_words,
            prompt_length=config.prompt_length,
            epsilon=config.layer_norm_epsilon,
            weights=_NUMBERS[self.dtype],
            cache=_NUMBERS[self.kv_dtype],
            isa=self.isa,
            threads=n_threads,
        )
        self.threads: int = self._model.threads
        shapes = config.tensor_shapes()
        missing = sorted(shapes.keys() - weights.keys())
        if missing:
            raise ValueError(f"weights lack {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}")
        shapes |= config.bias_shapes()
        for name, tensor in weights.items():
            if name not in shapes:
                raise ValueError(f"weights hold {name}, which the configuration does not know")
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                raise TypeError(f"{name} must be a floating-point tensor, not {getattr(tensor, 'dtype', type(tensor))}")
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {shapes[name]}")
            self._model.load(name, _float32(name, tensor, self.dtype))
        self._model.check_complete()

    def describe(self) -> dict[str, object]:
        """What this engine runs on and in, and why: for `fastigpt info`."""
        return {
            "isa": self.isa,
            "threads": self.threads,
            "dtype": str(self.dtype).removeprefix("torch."),
            "kv_dtype": str(self.kv_dtype).removeprefix("torch."),
            "reason": self._reason,
            "weight_bytes": self._model.weight_bytes,
        }

    def logits(self, tokens: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor:
        return self._score(tokens, prompt, -1)

    def hidden(self, tokens: torch.Tensor, layer: int, prompt: torch.Tensor | None = None) -> torch.Tensor:
        if not 0 <= layer <= self.config.n_layer:
            raise ValueError(f"layer must be from 0 to {self.config.n_layer}, not {layer}")
        return self._score(tokens, prompt, layer)

    def _score(self, tokens: torch.Tensor, prompt: torch.Tensor | None, layer: int) -> torch.Tensor:
        words = None if prompt is None else _ids("prompt", prompt)
        return finite(torch.from_numpy(self._model.score(_ids("tokens", tokens), words, layer)), self)

    def fill(self, job: Job, on_row: OnRow | None = None) -> Filled:
        drawing, width = job.drawing, self.config.width
        if job.window != "auto" and (not isinstance(job.window, int) or job.window < 1):
            raise ValueError(f'window must be "auto" or a positive int, not {job.window!r}')
        if job.draft is not None and not isinstance(job.draft, CpuEngine):
            raise ValueError(f"the cpu engine takes drafts from cpu engines, not from {job.draft.name}")
        fill = _C.CpuFill(
            self._model,
            _ids("tokens", job.tokens),
            _ids("index", job.index),
            _ids("source", job.source),
            None if job.prompt is None else _ids("prompt", job.prompt),
            seed=drawing.seed,
            temperature=drawing.temperature,
            top_k=min(drawing.top_k or 0, self.config.n_colors),
            top_p=1.0 if drawing.top_p is None else drawing.top_p,
            guidance_scale=drawing.guidance_scale,
            window=0 if job.window == "auto" else min(job.window, self.config.n_pixels),
            draft=None if job.draft is None else job.draft._model,
        )
        row = 0
        while row < self.config.height:
            # Between slices the interpreter handles signals, so Ctrl-C ends the job here.
            rows_done = self._advance(fill) // width
            if on_row is not None and rows_done > row:
                tokens = torch.from_numpy(fill.tokens())
                for r in range(row, rows_done):
                    on_row(range(len(tokens)), r, tokens[:, r * width : (r + 1) * width].clone())
            row = rows_done
        return Filled(torch.from_numpy(fill.tokens()), torch.from_numpy(fill.pass_starts()))

    def _advance(self, fill: _C.CpuFill) -> int:
        try:
            return fill.advance(_SLICE)
        except RuntimeError as error:
            if "not finite" not in str(error):
                raise
            raise NotFiniteError(f"{error}: its weights are damaged, or too large") from None

    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        rehearsal = _C.CpuFill.rehearsal(self._model, n=n, position=position, window=window)
        return rehearsal.rehearse

    def max_batch(self, job: Job) -> int:
        lanes = 1 if job.drawing.guidance_scale is None else 2
        engines = [self] if job.draft is None else [self, cast(CpuEngine, job.draft)]
        cache = lanes * sum(e._model.cache_bytes(e.config.context) for e in engines)
        return max(1, int(_MEMORY_SHARE * free_memory(self.device) / cache))


def _dtype(name: str, wish: torch.dtype | str | None, best: torch.dtype) -> torch.dtype:
    if isinstance(wish, str):
        wish = getattr(torch, wish, None) or wish
    chosen = best if wish is None else wish
    if not isinstance(chosen, torch.dtype) or chosen not in _NUMBERS:
        raise ValueError(f"{name} must be float32, bfloat16 or int8 on the cpu engine, not {wish}")
    return chosen


def _cache_of(dtype: torch.dtype) -> torch.dtype:
    """The cache that goes with a chosen dtype: as exact as it in float32, else bfloat16."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def _float32(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """What is kept in `dtype` must fit that; int8 has scales. CheckpointError if it does not, or is not finite.

    Without torch's threads, which a forked child has no more and a process at its limit of threads does not get.
    """
    x = readable(name, tensor).detach().cpu()
    if x.dtype == torch.bfloat16:
        stored = (np.ascontiguousarray(x.view(torch.uint16).numpy()).astype(np.uint32) << 16).view(np.float32)
    else:
        if x.dtype not in (torch.float16, torch.float32, torch.float64):
            x = x.to(torch.float32)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            stored = np.ascontiguousarray(x.numpy(), np.float32)
    limit = _BFLOAT16_OVERFLOWS if dtype == torch.bfloat16 else np.inf
    if not bool((np.abs(stored) < limit).all()):
        raise does_not_fit(name, tensor, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    if dtype == torch.int8:  # a row's scale is its largest number over 127, and its inverse must be a number as well
        stored = np.where(np.abs(stored) < _SMALLEST, np.float32(0), stored)
    return stored


def _ids(name: str, ids: torch.Tensor):  # type: ignore[no-untyped-def]
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, not {getattr(ids, 'dtype', type(ids).__name__)}")
    return readable(name, ids).detach().cpu().contiguous().numpy()
