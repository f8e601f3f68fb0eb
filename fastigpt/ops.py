"""The kernels as PyTorch operators, under one name on every device: torch.ops.fastigpt.*

On a GPU they are the Triton kernels, on a CPU PyTorch's own attention and products with the extension's draw;
`nearest_centroid` is the extension's on both. They have fake implementations and declare what they change, so
torch.compile(fullgraph=True) and torch.export take them as they are. Arguments are checked before anything is launched.
Inference only: nothing here has a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastigpt import _C
from fastigpt.engine import Drawing
from fastigpt.kernels import launch
from fastigpt.kernels.launch import PLAIN_TYPES, SCALED_TYPES
from fastigpt.operands import operands, same_device
from fastigpt.quantize import nearest_centroid as _nearest_centroid
from fastigpt.sampling import checked_drawing, filter_logits, guide
from fastigpt.scalars import integer, real, shown

Tensor = torch.Tensor

_library = torch.library.Library("fastigpt", "DEF")
_library.define("causal_attention(Tensor q, Tensor k, Tensor v) -> Tensor")
_library.define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, *, "
    "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, Tensor? prefix_k=None, Tensor? prefix_v=None, "
    "Tensor? prefix_k_scale=None, Tensor? prefix_v_scale=None, Tensor? prefix_lengths=None) -> Tensor"
)
_library.define(
    "sample_head(Tensor hidden, Tensor gain, Tensor weight, Tensor index, Tensor position, SymInt seed, *, "
    "float temperature=1.0, SymInt? top_k=None, float? top_p=None, Tensor? known=None, "
    "Tensor? unconditional=None, float guidance_scale=1.0, float epsilon=1e-05) -> Tensor"
)
_library.define("nearest_centroid(Tensor points, Tensor centroids) -> Tensor")


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, scaled by 1/√head_dim: query i of Tq looks at keys 0 … Tk − Tq + i.

    q: [B, Tq, n_head, head_dim], k, v: [B, Tk, n_head, head_dim], Tk ≥ Tq ≥ 1, all float32, bfloat16 or float16; tokens
    may be any distance apart, the heads of a token are contiguous. Returns [B, Tq, n_head, head_dim], contiguous.
    Raises ValueError or TypeError for anything else.
    """
    _need_tensors(q=q, k=k, v=v)
    return torch.ops.fastigpt.causal_attention(q, k, v)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_k_scale: Tensor | None = None,
    prefix_v_scale: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
) -> Tensor:
    """Appends W keys and values per image to its cache, and attends to the cache from W queries, causal among
    themselves.

    q, k, v: [n, W, n_head, head_dim]. k_cache, v_cache: [n, n_head, capacity, head_dim], changed: of q's dtype, or
    int8 or float8_e4m3fn with k_scale, v_scale float32 [n, n_head, capacity], changed too. positions: int32 [n], the
    slot of each image's first new key. prefix_k, prefix_v: [sources, n_head, P, head_dim] of the cache's dtype (with
    scales if that is 8-bit), keys that all images of a source see besides; image b belongs to source b // (n /
    sources). prefix_lengths: int32 [sources], how many of the P are used (None: all). Returns [n, W, n_head, head_dim].

    Raises ValueError where a position is negative or the window would not fit the capacity, which asks the device for
    the positions; while a CUDA graph is captured that is left out, and rows without a slot are not stored.
    """
    others = {
        "k_scale": k_scale, "v_scale": v_scale, "prefix_k": prefix_k, "prefix_v": prefix_v,
        "prefix_k_scale": prefix_k_scale, "prefix_v_scale": prefix_v_scale, "prefix_lengths": prefix_lengths,
    }  # fmt: skip
    _need_tensors(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, positions=positions, **others)
    return torch.ops.fastigpt.decode_attention(q, k, v, k_cache, v_cache, positions, **others)


def sample_head(
    hidden: Tensor,
    gain: Tensor,
    weight: Tensor,
    index: Tensor,
    position: Tensor,
    seed: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    known: Tensor | None = None,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
    epsilon: float = 1e-5,
) -> Tensor:
    """Tokens int64 [n] from hidden states [n, width]: RMS norm, head, filters, and a draw by the noise contract.

    gain: [width]. weight: [colours, width]. index, position: int64 [n], image index and pixel of each draw. seed:
    −2⁶³ … 2⁶⁴ − 1, taken modulo 2⁶⁴ (the operator behind this takes 64 bits, with their sign). temperature, top_k,
    top_p: as in fastigpt.sample. known: int64 [n], −1 = draw, else the result. unconditional: hidden states [n, width]
    of the same images without their prompt, for guidance. Raises ValueError or TypeError for anything else.
    """
    _need_tensors(
        hidden=hidden, gain=gain, weight=weight, index=index, position=position, known=known,
        unconditional=unconditional,
    )  # fmt: skip
    if not torch.compiler.is_compiling():  # there they are what they are; the schema takes less than these
        seed = _signed_seed(seed)
        temperature, guidance_scale = real("temperature", temperature), real("guidance_scale", guidance_scale)
        top_k = None if top_k is None else min(integer("top_k", top_k, "an int or None"), 2**63 - 1)
        top_p = None if top_p is None else real("top_p", top_p, "a number or None")
        epsilon = real("epsilon", epsilon)
    return torch.ops.fastigpt.sample_head(
        hidden, gain, weight, index, position, seed, temperature=temperature, top_k=top_k, top_p=top_p, known=known,
        unconditional=unconditional, guidance_scale=guidance_scale, epsilon=epsilon,
    )  # fmt: skip


def nearest_centroid(points: Tensor, centroids: Tensor) -> Tensor:
    """int64 [...]: the exact nearest row of centroids [K, D] for points [..., D]; see fastigpt.nearest_centroid."""
    _need_tensors(points=points, centroids=centroids)
    return torch.ops.fastigpt.nearest_centroid(points, centroids)


# --- what is accepted ------------------------------------------------------------------------------------------------

_CHANGED = ("k_cache", "v_cache", "k_scale", "v_scale")
_OPTIONAL = (
    "k_scale", "v_scale", "prefix_k", "prefix_v", "prefix_k_scale", "prefix_v_scale", "prefix_lengths", "known",
    "unconditional",
)  # fmt: skip


def _need_tensors(**given: object) -> None:
    """PyTorch says so too, in an error of another kind."""
    for name, x in given.items():
        if not isinstance(x, Tensor) and not (x is None and name in _OPTIONAL):
            raise TypeError(f"{name} must be a torch tensor, not {type(x).__name__}")


def _signed_seed(seed: int) -> int:
    number = seed if isinstance(seed, torch.SymInt) else integer("seed", seed)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be between -2**63 and 2**64 - 1, not {shown(number)}")
    return number - 2**64 if number >= 2**63 else number


def _shape(name: str, x: Tensor, expected: tuple[int, ...]) -> None:
    if x.shape != expected:
        raise ValueError(f"{name} must have shape {list(expected)}, not {list(x.shape)}")


def _dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    if x.dtype not in allowed:
        raise TypeError(f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in allowed)}, not {x.dtype}")


def _heads(name: str, x: Tensor) -> None:
    if x.stride(3) != 1 or (x.shape[2] > 1 and x.stride(2) != x.shape[3]):
        raise ValueError(f"the heads of a token of {name} must be contiguous, not strides {list(x.stride())}")


def _contiguous(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not strides {list(x.stride())}")


def _check_qkv_types(q: Tensor, k: Tensor, v: Tensor) -> None:
    _dtype("q", q, *PLAIN_TYPES)
    _dtype("k", k, q.dtype)
    _dtype("v", v, q.dtype)


def _check_causal(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q must be [B, Tq, n_head, head_dim] with Tq of at least 1, not {list(q.shape)}")
    batch, tq, n_head, head_dim = q.shape
    if k.dim() != 4 or k.shape[1] < tq:
        raise ValueError(f"k must be [{batch}, at least {tq}, {n_head}, {head_dim}], not {list(k.shape)}")
    _shape("k", k, (batch, k.shape[1], n_head, head_dim))
    _shape("v", v, tuple(k.shape))
    _check_qkv_types(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _heads(name, x)


class _Stored(NamedTuple):
    """Keys and values of a cache or a prefix: [rows, n_head, slots, head_dim], their scales [rows, n_head, slots]."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def addresses(self) -> tuple[int, ...]:
        scales = (0 if x is None else x.data_ptr() for x in (self.k_scale, self.v_scale))
        return self.k.data_ptr(), self.v.data_ptr(), *scales

    def check(self, before: str, n_head: int, head_dim: int) -> None:
        """before: of the arguments' names, "" or "prefix_"."""
        k_name, v_name = ("prefix_k", "prefix_v") if before else ("k_cache", "v_cache")
        rows, slots = self.k.shape[0], self.k.shape[2]
        _shape(k_name, self.k, (rows, n_head, slots, head_dim))
        _shape(v_name, self.v, tuple(self.k.shape))
        _dtype(v_name, self.v, self.k.dtype)
        _contiguous(
            **{k_name: self.k, v_name: self.v, f"{before}k_scale": self.k_scale, f"{before}v_scale": self.v_scale}
        )
        scaled = self.k.dtype in SCALED_TYPES
        for name, scale in ((f"{before}k_scale", self.k_scale), (f"{before}v_scale", self.v_scale)):
            if scaled != (scale is not None):
                wanted = "must be given" if scaled else "must be left out"
                raise ValueError(f"{name} {wanted}: {k_name} is {self.k.dtype}")
            if scale is not None:
                _shape(name, scale, tuple(self.k.shape[:-1]))
                _dtype(name, scale, torch.float32)


def _check_decode(
    q: Tensor, k: Tensor, v: Tensor, cache: _Stored, positions: Tensor, prefix: _Stored | None, lengths: Tensor | None
) -> None:
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must be [n, W, n_head, head_dim], none of them 0, not {list(q.shape)}")
    n, _, n_head, head_dim = q.shape
    _shape("k", k, tuple(q.shape))
    _shape("v", v, tuple(q.shape))
    if cache.k.dim() != 4 or cache.k.shape[2] < 1 or len(cache.k) != n:
        raise ValueError(f"k_cache must be [{n}, {n_head}, capacity, {head_dim}], not {list(cache.k.shape)}")
    _shape("positions", positions, (n,))
    _check_qkv_types(q, k, v)
    _dtype("k_cache", cache.k, q.dtype, *SCALED_TYPES)
    _dtype("positions", positions, torch.int32)
    for name, x in (("q", q), ("k", k), ("v", v)):
        launch.row_stride(name, x)
    _contiguous(positions=positions)
    cache.check("", n_head, head_dim)
    if prefix is not None:
        if prefix.k.dim() != 4:
            raise ValueError(f"prefix_k must be [sources, {n_head}, P, {head_dim}], not {list(prefix.k.shape)}")
        if len(prefix.k) < 1 or n % len(prefix.k):
            raise ValueError(f"prefix_k has {len(prefix.k)} sources, which must divide the {n} images")
        _dtype("prefix_k", prefix.k, cache.k.dtype)
        prefix.check("prefix_", n_head, head_dim)
        if lengths is not None:
            _shape("prefix_lengths", lengths, (len(prefix.k),))
            _dtype("prefix_lengths", lengths, torch.int32)
            _contiguous(prefix_lengths=lengths)


def _check_positions(positions: Tensor, window: int, capacity: int, prefix_lengths: Tensor | None, prefix: int) -> None:
    if positions.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = (int(x) for x in positions.aminmax())
    if low < 0 or high + window > capacity:
        raise ValueError(
            f"positions must be between 0 and {capacity - window} ({window} new keys, capacity {capacity}), "
            f"not {low if low < 0 else high}"
        )
    if prefix_lengths is not None:
        low, high = (int(x) for x in prefix_lengths.aminmax())
        if low < 0 or high > prefix:
            raise ValueError(f"prefix_lengths must be between 0 and {prefix}, not {low if low < 0 else high}")


def _check_sample(
    hidden: Tensor,
    gain: Tensor,
    weight: Tensor,
    index: Tensor,
    position: Tensor,
    known: Tensor | None,
    unconditional: Tensor | None,
) -> None:
    if hidden.dim() != 2 or 0 in hidden.shape:
        raise ValueError(f"hidden must be [n, width], none of them 0, not {list(hidden.shape)}")
    n, width = hidden.shape
    _shape("gain", gain, (width,))
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(f"weight must be [colours, {width}], not {list(weight.shape)}")
    _shape("weight", weight, (weight.shape[0], width))
    for name, x in (("hidden", hidden), ("gain", gain), ("weight", weight)):
        _dtype(name, x, *PLAIN_TYPES)
    for name, tensor in (("index", index), ("position", position), ("known", known)):
        if tensor is not None:
            _shape(name, tensor, (n,))
            _dtype(name, tensor, torch.int64)
    if unconditional is not None:
        _shape("unconditional", unconditional, (n, width))
        _dtype("unconditional", unconditional, hidden.dtype)


# --- the operators: checks, then the device's own --------------------------------------------------------------------


def _by_triton(x: Tensor) -> bool:
    return x.is_cuda


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = operands(q=q, k=k, v=v)
    _check_causal(q, k, v)
    if not _by_triton(q):
        return _attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).contiguous()
    configs = _configs(q)
    from fastigpt.kernels.causal_attention import causal_attention

    with torch.cuda.device_of(q):
        return causal_attention(q, k, v, configs=configs)


def _decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_k_scale: Tensor | None = None,
    prefix_v_scale: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
) -> Tensor:
    q, k, v, k_cache, v_cache, positions, k_scale, v_scale, prefix_k, prefix_v, *others = operands(
        _CHANGED, _OPTIONAL, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, positions=positions, k_scale=k_scale,
        v_scale=v_scale, prefix_k=prefix_k, prefix_v=prefix_v, prefix_k_scale=prefix_k_scale,
        prefix_v_scale=prefix_v_scale, prefix_lengths=prefix_lengths,
    )  # fmt: skip
    prefix_k_scale, prefix_v_scale, prefix_lengths = others
    cache = _Stored(k_cache, v_cache, k_scale, v_scale)
    if prefix_k is not None and prefix_v is not None:
        prefix: _Stored | None = _Stored(prefix_k, prefix_v, prefix_k_scale, prefix_v_scale)
    elif all(x is None for x in (prefix_k, prefix_v, prefix_k_scale, prefix_v_scale, prefix_lengths)):
        prefix = None
    else:
        raise ValueError("prefix_k and prefix_v must be given together, and with any other part of a prefix")
    _check_decode(q, k, v, cache, positions, prefix, prefix_lengths)
    decode = _decode_gpu if _by_triton(q) else _decode_cpu
    return decode(q, k, v, cache, positions, prefix, prefix_lengths)


def _sample_head(
    hidden: Tensor,
    gain: Tensor,
    weight: Tensor,
    index: Tensor,
    position: Tensor,
    seed: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    known: Tensor | None = None,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
    epsilon: float = 1e-5,
) -> Tensor:
    hidden, gain, weight, index, position, known, unconditional = operands(
        (), _OPTIONAL, hidden=hidden, gain=gain, weight=weight, index=index, position=position, known=known,
        unconditional=unconditional,
    )  # fmt: skip
    _check_sample(hidden, gain, weight, index, position, known, unconditional)
    scale = None if unconditional is None else guidance_scale
    drawing = checked_drawing(seed % 2**64, temperature, top_k, top_p, scale)
    checked_drawing(0, guidance_scale=guidance_scale)  # one that is not used must be right, too
    sample = _sample_gpu if _by_triton(hidden) else _sample_cpu
    tokens = sample(hidden, gain, weight, index, position, unconditional, drawing, epsilon)
    return tokens if known is None else torch.where(known >= 0, known, tokens)


def _nearest_centroid_anywhere(points: Tensor, centroids: Tensor) -> Tensor:
    return _nearest_centroid(points, centroids)


# --- on the CPU: the extension, and PyTorch --------------------------------------------------------------------------


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, n_head, Tq, head_dim], k, v [B, n_head, Tk, head_dim], the last query sees all keys. SDPA's own causal flag
    skips the masked half, but stands for this only where there are as many queries as keys."""
    tq, tk = q.shape[2], k.shape[2]
    if tq == 1 or tq == tk:
        return F.scaled_dot_product_attention(q, k, v, is_causal=tq > 1)
    seen = torch.ones(tq, tk, dtype=torch.bool, device=q.device).tril(tk - tq)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def _scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] in 8 bits, and its float32 scales [...]."""
    x = x.float()
    largest = x.abs().amax(-1)
    scale = torch.where(largest > 0, largest / SCALED_TYPES[dtype], 1.0)
    x = x / scale[..., None]
    return (torch.sign(x) * (x.abs() + 0.5).floor() if dtype == torch.int8 else x).to(dtype), scale


def _read(stored: _Stored, rows: slice, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, n_head, end, head_dim] of the first `end` slots in dtype (8-bit ones: float32); views
    where they have it already."""
    at = (rows, slice(None), slice(end))
    found = []
    for x, scale in ((stored.k, stored.k_scale), (stored.v, stored.v_scale)):
        if scale is None:
            found.append(x[at].to(dtype))
        else:
            small = x[at] if x.dtype == torch.int8 else x[at].float()  # int8 · float32 is converted on the way
            found.append(small * scale[at][..., None])
    return found[0], found[1]


def _append(x: Tensor, to: Tensor, starts: list[int], together: bool) -> None:
    """x [n, W, n_head, ...] to [n, n_head, capacity, ...] from slots `starts` on, all the same if `together`."""
    window = x.shape[1]
    if together:
        to[:, :, starts[0] : starts[0] + window] = x.transpose(1, 2)
    else:
        slots = torch.tensor(starts, device="cpu")[:, None] + torch.arange(window, device="cpu")
        to[torch.arange(len(x), device="cpu")[:, None], :, slots] = x


def _decode_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: _Stored,
    positions: Tensor,
    prefix: _Stored | None,
    lengths: Tensor | None,
    *,
    isa: str = "auto",
) -> Tensor:
    if q.dtype == torch.float16 or cache.k.dtype == torch.float8_e4m3fn:
        _check_positions(positions, q.shape[1], cache.k.shape[2], lengths, 0 if prefix is None else prefix.k.shape[2])
        return _decode_plain(q, k, v, cache, positions, prefix, lengths)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    n, window, n_head, head_dim = q.shape
    nothing = (0, 0, 0, 0)
    _C.decode_rows(
        _dtype_name(q), _dtype_name(cache.k), (n, window, n_head, head_dim), (q.data_ptr(), k.data_ptr(), v.data_ptr()),
        tuple(launch.row_stride(name, x) for name, x in (("q", q), ("k", k), ("v", v))),
        cache.addresses(), cache.k.shape[2], positions.data_ptr(),
        nothing if prefix is None else prefix.addresses(), 0 if prefix is None else len(prefix.k),
        0 if prefix is None else prefix.k.shape[2], 0 if lengths is None else lengths.data_ptr(),
        y.data_ptr(), isa, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _decode_plain(
    q: Tensor, k: Tensor, v: Tensor, cache: _Stored, positions: Tensor, prefix: _Stored | None, lengths: Tensor | None
) -> Tensor:
    """The same in PyTorch's operators: the twin of the extension's, and what serves float16 and float8."""
    n, window = q.shape[:2]
    starts = positions.tolist()
    # Images at one position see as many slots and can attend together; else each attends to just the slots it sees.
    together = prefix is None and len(set(starts)) == 1
    for x, to, scale in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        if scale is None:
            _append(x, to, starts, together)
        else:
            small, factor = _scaled(x, to.dtype)
            _append(small.view(torch.uint8), to.view(torch.uint8), starts, together)
            _append(factor, scale, starts, together)
    # SDPA with one query to a head takes twice as long on bfloat16 as on float32, with several less.
    dtype = torch.float32 if window == 1 or cache.k_scale is not None else q.dtype
    if together and cache.k.dtype == dtype:
        keys, values = _read(cache, slice(n), starts[0] + window, dtype)
        return _attend(q.transpose(1, 2), keys, values).transpose(1, 2).contiguous()
    # An image at a time: what is converted stays in the processor's cache.
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    queries = q.to(dtype).transpose(1, 2)
    for b, start in enumerate(starts):
        keys, values = _read(cache, slice(b, b + 1), start + window, dtype)
        if prefix is not None:
            source = b // (n // len(prefix.k))
            used = prefix.k.shape[2] if lengths is None else int(lengths[source])
            first_keys, first_values = _read(prefix, slice(source, source + 1), used, dtype)
            keys, values = torch.cat([first_keys, keys], 2), torch.cat([first_values, values], 2)
        y[b : b + 1] = _attend(queries[b : b + 1], keys, values).transpose(1, 2)
    return y


def _sample_cpu(
    hidden: Tensor,
    gain: Tensor,
    weight: Tensor,
    index: Tensor,
    position: Tensor,
    unconditional: Tensor | None,
    drawing: Drawing,
    epsilon: float,
    *,
    isa: str = "auto",
) -> Tensor:
    if torch.float16 in (hidden.dtype, weight.dtype):
        return _sample_plain(hidden, gain, weight, index, position, unconditional, drawing, epsilon)
    tokens = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    # Named, so that copies live until the call is done.
    hidden, weight, index, position = (x.contiguous() for x in (hidden, weight, index, position))
    gain = gain.float().contiguous()
    without = None if unconditional is None else unconditional.contiguous()
    scale = 1.0 if drawing.guidance_scale is None else drawing.guidance_scale
    _C.sample_rows(
        _dtype_name(hidden), _dtype_name(weight), (*hidden.shape, len(weight)), hidden.data_ptr(),
        0 if without is None else without.data_ptr(), gain.data_ptr(), weight.data_ptr(), index.data_ptr(),
        position.data_ptr(), epsilon, drawing.seed, drawing.temperature, drawing.top_k or 0,
        1.0 if drawing.top_p is None else drawing.top_p, scale, tokens.data_ptr(), isa, torch.get_num_threads(),
    )  # fmt: skip
    return tokens


def _sample_plain(
    hidden: Tensor,
    gain: Tensor,
    weight: Tensor,
    index: Tensor,
    position: Tensor,
    unconditional: Tensor | None,
    drawing: Drawing,
    epsilon: float,
) -> Tensor:
    """The same in PyTorch's operators: the twin of the extension's, and what serves float16."""

    def logits(x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], gain.float(), epsilon) @ weight.float().T

    scores = logits(hidden)
    if unconditional is not None and drawing.guidance_scale is not None:
        scores = guide(scores, logits(unconditional), drawing.guidance_scale)
    scores = filter_logits(scores, drawing)
    if drawing.temperature == 0:
        return scores.argmax(-1)
    ids = (index.contiguous().numpy(), position.contiguous().numpy())
    tokens = torch.from_numpy(_C.cpu_draw(scores.contiguous().numpy(), drawing.seed, *ids, "auto"))
    if bool((tokens < 0).any()):
        raise ValueError("hidden, gain and weight must give finite logits")
    return tokens


# --- on a GPU: Triton, imported when first used ----------------------------------------------------------------------


def _configs(x: Tensor) -> launch.Table:
    reason = launch.why_unavailable(x.device)
    if reason is not None:
        raise RuntimeError(f"fastigpt's operators cannot run on {x.device}: {reason}")
    return launch.table(launch.family(x.device))


def _decode_gpu(
    q: Tensor, k: Tensor, v: Tensor, cache: _Stored, positions: Tensor, prefix: _Stored | None, lengths: Tensor | None
) -> Tensor:
    if cache.k.dtype == torch.float8_e4m3fn and not launch.stores_float8(q.device):
        raise ValueError("a float8_e4m3fn cache needs an NVIDIA GPU of compute capability 8.9 or later")
    _check_positions(positions, q.shape[1], cache.k.shape[2], lengths, 0 if prefix is None else prefix.k.shape[2])
    configs = _configs(q)
    from fastigpt.kernels.decode_attention import decode_attention, make_prefix
    from fastigpt.kernels.kv_cache import append_kv

    shared = None
    if prefix is not None:
        n, sources = len(q), len(prefix.k)
        if lengths is None:
            lengths = torch.full((sources,), prefix.k.shape[2], dtype=torch.int32, device=q.device)
        of_image = [b // (n // sources) for b in range(n)]
        shared = make_prefix(
            prefix.k, prefix.v, lengths, of_image, q.shape[1], configs, q.dtype, prefix.k_scale, prefix.v_scale
        )
    with torch.cuda.device_of(q):
        append_kv(k, v, cache.k, cache.v, positions, cache.k_scale, cache.v_scale)
        return decode_attention(
            q, cache.k, cache.v, positions, configs=configs, k_scale=cache.k_scale, v_scale=cache.v_scale, prefix=shared
        )


def _sample_gpu(
    hidden: Tensor,
    gain: Tensor,
    weight: Tensor,
    index: Tensor,
    position: Tensor,
    unconditional: Tensor | None,
    drawing: Drawing,
    epsilon: float,
) -> Tensor:
    configs = _configs(hidden)
    from fastigpt.kernels.sample_head import Head, State, make_scratch, sample_head, set_drawing

    n, device = len(hidden), hidden.device
    x = hidden if unconditional is None else torch.cat([hidden, unconditional])
    head = Head(gain.contiguous(), weight.contiguous(), weight, weight, epsilon)
    lanes = torch.zeros(len(x), dtype=torch.int32, device=device)
    integers = torch.empty(2, dtype=torch.int64, device=device)
    numbers = torch.empty(3, dtype=torch.float32, device=device)
    set_drawing(integers, numbers, drawing, len(weight))
    canvas = torch.full((n, 1), -1, dtype=torch.int32, device=device)  # known tokens are put in by the caller
    state = State(canvas, canvas.to(torch.int8), position.int(), lanes, lanes, index.contiguous(), integers, numbers)
    inputs = torch.zeros((n, 1), dtype=torch.int32, device=device)
    scratch = make_scratch(n, 1, len(weight), device)
    with torch.cuda.device_of(hidden):
        sample_head(x.float().contiguous(), inputs, head, state, scratch, drawing, configs=configs, advance=False)
    return scratch.chosen[:, 0].long()


# --- shapes without values -------------------------------------------------------------------------------------------
# PyTorch comes here for fake tensors and wherever any operand is on the meta device, the others being what they are.


def _causal_attention_fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    same_device(q=q, k=k, v=v)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _decode_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, **others: Tensor | None
) -> Tensor:
    same_device(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, positions=positions, **others)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _sample_head_fake(
    hidden: Tensor,
    gain: Tensor,
    weight: Tensor,
    index: Tensor,
    position: Tensor,
    seed: int,
    *,
    known: Tensor | None = None,
    unconditional: Tensor | None = None,
    **_: object,
) -> Tensor:
    same_device(
        hidden=hidden, gain=gain, weight=weight, index=index, position=position, known=known,
        unconditional=unconditional,
    )  # fmt: skip
    return hidden.new_empty(hidden.shape[:1], dtype=torch.int64)


def _nearest_centroid_fake(points: Tensor, centroids: Tensor) -> Tensor:
    same_device(points=points, centroids=centroids)
    return points.new_empty(points.shape[:-1], dtype=torch.int64)


for _name, _run, _fake in (
    ("causal_attention", _causal_attention, _causal_attention_fake),
    ("decode_attention", _decode_attention, _decode_attention_fake),
    ("sample_head", _sample_head, _sample_head_fake),
    ("nearest_centroid", _nearest_centroid_anywhere, _nearest_centroid_fake),
):
    # For every kind of tensor, so that what is not ours is refused in our words (operands.py). PyTorch would work out
    # lazily negated and zero tensors before it comes here, but cannot where they are to be changed.
    for _key in ("CompositeExplicitAutograd", "AutogradNestedTensor"):
        _library.impl(_name, _run, _key)
    for _key in ("Conjugate", "Negative", "ZeroTensor"):
        _library.impl(_name, torch.library.fallthrough_kernel, _key)
    torch.library.register_fake(f"fastigpt::{_name}", _fake, lib=_library)
