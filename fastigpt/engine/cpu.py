"""The CPU engine: csrc/ behind the Engine protocol.

Python checks arguments and hands arrays over; a whole pass (all layers, filters, draws, the next guesses) and many
passes run in one call, without the GIL. Results are bitwise independent of neighbours, slots, window, prefix sharing
and threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from fastigpt import _C
from fastigpt.engine import Advance, Engine, Window, check_window
from fastigpt.engine.arithmetic import does_not_fit, finite
from fastigpt.engine.memory import free_memory
from fastigpt.engine.rows_in_use import RowsInUse
from fastigpt.errors import NotFiniteError
from fastigpt.job import Filled, Request
from fastigpt.nearest import check_threads
from fastigpt.operands import readable
from fastigpt.spec import ModelSpec
from fastigpt.tensors import RowReader, row_reader

_PREFIX = "prefix.embedding"
_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_BFLOAT16_OVERFLOWS = np.float32((2 - 2**-8) * 2.0**127)  # halfway between the largest and what would come next
_PIECE = 1 << 20  # numbers that are looked at together
_MEMORY_SHARE = 0.8  # of the free memory, for the caches of a session
# Slots a thread is kept busy by; and how many times the weights the caches are, so that reading both costs as much as
# reading the caches. Beyond, caches only leave the processor's: benchmarks/results/batch_size.md.
_SLOTS_OF_A_THREAD, _FEWEST_SLOTS, _CACHES_TO_WEIGHTS = 8, 16, 8


def default_dtypes(isa: str) -> tuple[torch.dtype, torch.dtype, str]:
    """dtype and kv_dtype of an engine that was not told, and why. `isa`: one of fastigpt._C.supported_isas()."""
    if isa == "amx":
        return torch.bfloat16, torch.bfloat16, "AMX: half the bytes, several times the rate"
    if isa == "avx512vnni":
        return torch.bfloat16, torch.bfloat16, "AVX512-BF16: half the bytes, twice the rate"
    if isa == "generic":
        return torch.float32, torch.float32, "without AVX2, widening bfloat16 costs more than the bytes it saves"
    return torch.bfloat16, torch.bfloat16, "bfloat16 in memory halves the bytes to read; arithmetic is float32"


class CpuEngine:
    """`weights`: CPU tensors named and shaped as spec.weight_shapes() says, and any of spec.bias_shapes(). They are
    asked for one after another and packed, so that a mapping that makes them when asked never holds them all;
    embeddings are read where they lie if they are float32 or bfloat16, and must not be changed afterwards. Of a prefix
    embedding whose rows the mapping can read one by one, only those that prefixes had are in memory.

    dtype: torch.float32, bfloat16 or int8 (weights per output channel and activations per row; embeddings, norms and
    biases stay float32, the head bfloat16). kv_dtype: the same three (int8: a scale for each token and head). isa:
    "auto" or one of fastigpt._C.supported_isas(). threads: None takes torch.get_num_threads().
    """

    name = "cpu"

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, torch.Tensor],
        *,
        dtype: torch.dtype | str | None = None,
        kv_dtype: torch.dtype | str | None = None,
        isa: str = "auto",
        threads: int | None = None,
    ) -> None:
        if isa != "auto" and isa not in _C.supported_isas():
            raise ValueError(f"isa must be auto or one of {', '.join(_C.supported_isas())}, not {isa!r}")
        n_threads = check_threads(threads) or min(torch.get_num_threads(), _C.MAX_THREADS)
        self.spec, self.device = spec, torch.device("cpu")
        self.isa = _C.supported_isas()[-1] if isa == "auto" else isa
        best_dtype, best_kv, self._reason = default_dtypes(self.isa)
        self.dtype = _dtype("dtype", dtype, best_dtype)
        self.kv_dtype = _dtype("kv_dtype", kv_dtype, best_kv if dtype is None else _cache_of(self.dtype))
        if dtype is not None:
            self._reason = "asked for"
        self._model = _C.CpuModel(
            n_layer=spec.n_layer,
            n_head=spec.block.n_head,
            n_kv_head=spec.block.n_kv_head,
            head_dim=spec.block.head_dim,
            width=spec.width,
            n_inner=spec.block.n_inner,
            n_positions=spec.n_positions,
            columns=spec.columns,
            n_tokens=spec.n_tokens,
            n_prefix_tokens=spec.n_prefix_tokens,
            prefix_length=spec.prefix_length,
            epsilon=spec.block.norm_epsilon,
            positions=spec.positions,
            mlp=spec.block.mlp,
            head_inner=spec.head_inner,
            weights=_name(self.dtype),
            cache=_name(self.kv_dtype),
            isa=self.isa,
            threads=n_threads,
        )
        self.threads: int = self._model.threads
        shapes = spec.weight_shapes()
        missing = sorted(shapes.keys() - weights.keys())
        if missing:
            raise ValueError(f"weights lack {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}")
        shapes |= spec.bias_shapes()
        self._prefix_rows: RowsInUse | None = None
        for name, tensor in weights.items():
            if name not in shapes:
                raise ValueError(f"weights hold {name}, which the spec does not know")
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                raise TypeError(f"{name} must be a floating-point tensor, not {getattr(tensor, 'dtype', type(tensor))}")
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {shapes[name]}")
            numbers = _numbers(name, tensor, self.dtype)
            if name == _PREFIX and (reader := row_reader(weights, name)) is not None:
                numbers = self._rows_in_use(numbers, reader)
            self._model.load(name, numbers)
            del tensor, numbers  # before the next one is made
        self._model.check_complete()

    def _rows_in_use(self, numbers: np.ndarray, reader: RowReader) -> np.ndarray:
        """numbers: all of them, which have been looked at and are let go."""
        self._prefix_rows = RowsInUse(
            numbers.shape, numbers.dtype, lambda row: _numbers(_PREFIX, reader(row), self.dtype)
        )
        return self._prefix_rows.numbers

    def need(self, prefix: Iterable[int]) -> None:
        """Has the embeddings of these ids in memory: said of every prefix before the model reads it."""
        if self._prefix_rows is not None:
            self._prefix_rows.need(prefix)

    def describe(self) -> dict[str, object]:
        """What this engine runs on and in, and why: for `fastigpt info`."""
        return {
            "isa": self.isa,
            "threads": self.threads,
            "dtype": _name(self.dtype),
            "kv_dtype": _name(self.kv_dtype),
            "reason": self._reason,
            "weight_bytes": self._model.weight_bytes,
        }

    def logits(self, tokens: torch.Tensor, prefix: torch.Tensor | None = None) -> torch.Tensor:
        return self._score(tokens, prefix, -1)

    def hidden(self, tokens: torch.Tensor, layer: int, prefix: torch.Tensor | None = None) -> torch.Tensor:
        if not 0 <= layer <= self.spec.n_layer:
            raise ValueError(f"layer must be from 0 to {self.spec.n_layer}, not {layer}")
        return self._score(tokens, prefix, layer)

    def _score(self, tokens: torch.Tensor, prefix: torch.Tensor | None, layer: int) -> torch.Tensor:
        if prefix is None:
            prefix = self.spec.prefix_rows([self.spec.unconditional]).expand(len(tokens), -1)
        ids, before = _ids("tokens", tokens), _ids("prefix", prefix)
        self.need(np.unique(before).tolist())
        return finite(torch.from_numpy(self._model.score(ids, before, layer)), self)

    def open(self, capacity: int, *, window: Window = "auto", draft: Engine | None = None) -> CpuSession:
        return CpuSession(self, capacity, check_window(window, self.spec), _drafting(draft))

    def room(self, *, guided: bool, window: Window = "auto", draft: Engine | None = None) -> int:
        engines = [self, *([] if draft is None else [_drafting(draft)])]
        cache = (2 if guided else 1) * sum(e._model.cache_bytes(e.spec.context) for e in engines if e is not None)
        return max(1, int(_MEMORY_SHARE * free_memory(self.device) / cache))

    def enough(self, *, guided: bool) -> int | None:
        cache = (2 if guided else 1) * self._model.cache_bytes(self.spec.context)
        by_weights = -(-_CACHES_TO_WEIGHTS * self._model.weight_bytes // cache)
        return max(_FEWEST_SLOTS, _SLOTS_OF_A_THREAD * self.threads, by_weights)

    def prepared_pass(self, *, n: int, position: int, window: int = 1) -> Callable[[], None]:
        self.need(self.spec.unconditional)
        rehearsal = _C.CpuSession.rehearsal(self._model, n=n, position=position, window=window)
        return rehearsal.rehearse


class CpuSession:
    """csrc/engine/session.h. Keys and values lie in memory that is reserved at once and touched as it is needed."""

    def __init__(self, engine: CpuEngine, capacity: int, window: int | None, draft: CpuEngine | None) -> None:
        self.capacity, self._spec = capacity, engine.spec
        self._readers = [engine] if draft is None else [engine, draft]
        for reader in self._readers:
            reader.need(reader.spec.unconditional)
        self._session = _C.CpuSession(
            engine._model,
            capacity=capacity,
            window=window or 0,
            draft=None if draft is None else draft._model,
            draft_prefix=[] if draft is None else list(draft.spec.unconditional),
        )

    def add(self, requests: Sequence[Request]) -> list[int]:
        return self._session.add([self._checked(request) for request in requests])

    def _checked(self, request: Request) -> object:
        drawing = request.drawing
        for reader in self._readers:
            reader.need((*request.prefix, *(request.negative or ())))
        return self._session.request(
            _ids("tokens", request.tokens),
            index=request.index,
            seed=drawing.seed,
            temperature=drawing.temperature,
            top_k=min(drawing.top_k or 0, self._spec.n_tokens),
            top_p=1.0 if drawing.top_p is None else drawing.top_p,
            guidance_scale=drawing.guidance_scale,
            prefix=list(request.prefix),
            negative=list(request.negative or ()),
            stop=self._spec.n_positions if request.stop is None else request.stop,
            score=request.score,
        )

    def step(self, seconds: float) -> list[Advance]:
        try:
            self._session.step(seconds)
        except RuntimeError as error:
            if "not finite" not in str(error):
                raise
            raise NotFiniteError(f"{error}: its weights are damaged, or too large") from None
        return [Advance(slot, decided) for slot, decided in self._session.decided()]

    def read(self, slots: Sequence[int]) -> Filled:
        tokens, pass_starts, log_likelihood = self._session.read(list(slots))
        return Filled(*(torch.from_numpy(found) for found in (tokens, pass_starts, log_likelihood)))

    def resume(self, slot: int, stop: int) -> None:
        self._session.resume(slot, stop)

    def fork(self, slot: int, indices: Sequence[int]) -> list[int]:
        return self._session.fork(slot, list(indices))

    def remove(self, slot: int) -> None:
        self._session.remove(slot)

    def close(self) -> None:
        del self._session


def _drafting(draft: Engine | None) -> CpuEngine | None:
    if draft is not None and not isinstance(draft, CpuEngine):
        raise ValueError(f"the cpu engine takes drafts from cpu engines, not from {draft.name}")
    return draft


def _dtype(name: str, wish: torch.dtype | str | None, best: torch.dtype) -> torch.dtype:
    if isinstance(wish, str):
        wish = getattr(torch, wish, None) or wish
    chosen = best if wish is None else wish
    if not isinstance(chosen, torch.dtype) or chosen not in _DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or int8 on the cpu engine, not {wish}")
    return chosen


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cache_of(dtype: torch.dtype) -> torch.dtype:
    """The cache that goes with a chosen dtype: as exact as it in float32, else bfloat16."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def _numbers(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """A tensor's numbers as float32, or the bits of bfloat16 as uint16, where they lie if possible. What is kept in
    `dtype` must fit that; int8 has scales. CheckpointError if it does not, or is not finite.

    Without torch's threads, which a forked child has no more and a process at its limit of threads does not get.
    """
    x = readable(name, tensor).detach().cpu()
    if x.dtype == torch.bfloat16:
        numbers = np.ascontiguousarray(x.view(torch.uint16).numpy())
        fits = _each_piece(numbers, lambda bits: bits & np.uint16(0x7F80) != 0x7F80)
    else:
        if x.dtype not in (torch.float16, torch.float32, torch.float64):
            x = x.to(torch.float32)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            numbers = np.ascontiguousarray(x.numpy(), np.float32)
        limit = _BFLOAT16_OVERFLOWS if dtype == torch.bfloat16 else np.inf
        fits = _each_piece(numbers, lambda part: np.abs(part) < limit)
    if not fits:
        raise does_not_fit(name, tensor, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    return numbers


def _each_piece(numbers: np.ndarray, holds: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether it holds for all numbers, of which a whole copy may not fit the memory."""
    flat = numbers.reshape(-1)
    return all(bool(holds(flat[first : first + _PIECE]).all()) for first in range(0, flat.size, _PIECE))


def _ids(name: str, ids: torch.Tensor) -> np.ndarray:
    if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, not {getattr(ids, 'dtype', type(ids).__name__)}")
    return readable(name, ids).detach().cpu().contiguous().numpy()
