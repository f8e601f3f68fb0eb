"""Attention to a key-value cache, appending included: the operator of decoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastigpt import _C, formulas
from fastigpt.kernels import launch
from fastigpt.kernels.launch import SCALED_TYPES
from fastigpt.kernels.launching import launching
from fastigpt.operands import operands, same_device
from fastigpt.ops import devices
from fastigpt.ops.checks import OPTIONAL, check_contiguous, check_dtype, check_qkv_types, check_shape, need_tensors
from fastigpt.ops.kv_cache import append_kv_reference
from fastigpt.ops.register import register

Tensor = torch.Tensor

_CHANGED = ("k_cache", "v_cache", "k_scale", "v_scale")


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
    need_tensors(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, positions=positions, **others)
    return torch.ops.fastigpt.decode_attention(q, k, v, k_cache, v_cache, positions, **others)


class Stored(NamedTuple):
    """Keys and values of a cache or a prefix: [rows, n_head, slots, head_dim], their scales [rows, n_head, slots]."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    def addresses(self) -> tuple[int, ...]:
        scales = (0 if x is None else x.data_ptr() for x in (self.k_scale, self.v_scale))
        return self.k.data_ptr(), self.v.data_ptr(), *scales

    def read(self, row: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values float32 [n_head, end, head_dim] in the first slots of a row."""
        k, v = self.k[row, :, :end].float(), self.v[row, :, :end].float()
        if self.k_scale is not None and self.v_scale is not None:
            k, v = k * self.k_scale[row, :, :end, None], v * self.v_scale[row, :, :end, None]
        return k, v

    def check(self, before: str, n_head: int, head_dim: int) -> None:
        """before: of the arguments' names, "" or "prefix_"."""
        k_name, v_name = ("prefix_k", "prefix_v") if before else ("k_cache", "v_cache")
        rows, slots = self.k.shape[0], self.k.shape[2]
        check_shape(k_name, self.k, (rows, n_head, slots, head_dim))
        check_shape(v_name, self.v, tuple(self.k.shape))
        check_dtype(v_name, self.v, self.k.dtype)
        check_contiguous(
            **{k_name: self.k, v_name: self.v, f"{before}k_scale": self.k_scale, f"{before}v_scale": self.v_scale}
        )
        scaled = self.k.dtype in SCALED_TYPES
        for name, scale in ((f"{before}k_scale", self.k_scale), (f"{before}v_scale", self.v_scale)):
            if scaled != (scale is not None):
                wanted = "must be given" if scaled else "must be left out"
                raise ValueError(f"{name} {wanted}: {k_name} is {self.k.dtype}")
            if scale is not None:
                check_shape(name, scale, tuple(self.k.shape[:-1]))
                check_dtype(name, scale, torch.float32)


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_k_scale: Tensor | None = None,
    prefix_v_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    source: list[int] | None = None,
) -> Tensor:
    """The plain twin behind the appending, with the kernel's arguments: float32 inside, an image at a time.

    slots: int32 [n], of each image's first query; −1: its result is 0. source: of each image, the prefix it reads; −1:
    none. Queries past the capacity see all of the cache.
    """
    cache = Stored(k_cache, v_cache, k_scale, v_scale)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for b, first in enumerate(slots.tolist()):
        if first < 0:
            continue
        before, (k, v) = first, cache.read(b, min(first + q.shape[1], k_cache.shape[2]))
        if prefix_k is not None and (source is None or source[b] >= 0):
            assert prefix_v is not None and source is not None and lengths is not None
            length = int(lengths[source[b]])
            prefix = Stored(prefix_k, prefix_v, prefix_k_scale, prefix_v_scale).read(source[b], length)
            before, k, v = before + length, torch.cat([prefix[0], k], 1), torch.cat([prefix[1], v], 1)
        out[b] = formulas.causal_attention(q[b].transpose(0, 1).float(), k, v, before).transpose(0, 1).to(q.dtype)
    return out


def in_pytorch(
    q: Tensor, k: Tensor, v: Tensor, cache: Stored, positions: Tensor, prefix: Stored | None, lengths: Tensor | None
) -> Tensor:
    """The operator by its twins, which serves float16 and float8 on a CPU."""
    append_kv_reference(k, v, cache.k, cache.v, positions, cache.k_scale, cache.v_scale)
    shared: dict[str, Any] = {}
    if prefix is not None:
        shared = {f"prefix_{name}": x for name, x in prefix._asdict().items()}
        sources, length = len(prefix.k), prefix.k.shape[2]
        shared["lengths"] = torch.full((sources,), length, device=q.device) if lengths is None else lengths
        shared["source"] = _sources(len(q), sources)
    return decode_attention_reference(
        q, cache.k, cache.v, positions, k_scale=cache.k_scale, v_scale=cache.v_scale, **shared
    )


def _sources(n: int, sources: int) -> list[int]:
    """Of each image the prefix it reads."""
    return [b // (n // sources) for b in range(n)]


def _check(
    q: Tensor, k: Tensor, v: Tensor, cache: Stored, positions: Tensor, prefix: Stored | None, lengths: Tensor | None
) -> None:
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must be [n, W, n_head, head_dim], none of them 0, not {list(q.shape)}")
    n, _, n_head, head_dim = q.shape
    check_shape("k", k, tuple(q.shape))
    check_shape("v", v, tuple(q.shape))
    if cache.k.dim() != 4 or cache.k.shape[2] < 1 or len(cache.k) != n:
        raise ValueError(f"k_cache must be [{n}, {n_head}, capacity, {head_dim}], not {list(cache.k.shape)}")
    check_shape("positions", positions, (n,))
    check_qkv_types(q, k, v)
    check_dtype("k_cache", cache.k, q.dtype, *SCALED_TYPES)
    check_dtype("positions", positions, torch.int32)
    for name, x in (("q", q), ("k", k), ("v", v)):
        launch.row_stride(name, x)
    check_contiguous(positions=positions)
    cache.check("", n_head, head_dim)
    if prefix is not None:
        if prefix.k.dim() != 4:
            raise ValueError(f"prefix_k must be [sources, {n_head}, P, {head_dim}], not {list(prefix.k.shape)}")
        if len(prefix.k) < 1 or n % len(prefix.k):
            raise ValueError(f"prefix_k has {len(prefix.k)} sources, which must divide the {n} images")
        check_dtype("prefix_k", prefix.k, cache.k.dtype)
        prefix.check("prefix_", n_head, head_dim)
        if lengths is not None:
            check_shape("prefix_lengths", lengths, (len(prefix.k),))
            check_dtype("prefix_lengths", lengths, torch.int32)
            check_contiguous(prefix_lengths=lengths)


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


def _run(
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
        _CHANGED, OPTIONAL, q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, positions=positions, k_scale=k_scale,
        v_scale=v_scale, prefix_k=prefix_k, prefix_v=prefix_v, prefix_k_scale=prefix_k_scale,
        prefix_v_scale=prefix_v_scale, prefix_lengths=prefix_lengths,
    )  # fmt: skip
    prefix_k_scale, prefix_v_scale, prefix_lengths = others
    cache = Stored(k_cache, v_cache, k_scale, v_scale)
    if prefix_k is not None and prefix_v is not None:
        prefix: Stored | None = Stored(prefix_k, prefix_v, prefix_k_scale, prefix_v_scale)
    elif all(x is None for x in (prefix_k, prefix_v, prefix_k_scale, prefix_v_scale, prefix_lengths)):
        prefix = None
    else:
        raise ValueError("prefix_k and prefix_v must be given together, and with any other part of a prefix")
    _check(q, k, v, cache, positions, prefix, prefix_lengths)
    decode = _on_gpu if devices.by_triton(q) else on_cpu
    return decode(q, k, v, cache, positions, prefix, prefix_lengths)


def on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Stored,
    positions: Tensor,
    prefix: Stored | None,
    lengths: Tensor | None,
    *,
    isa: str = "auto",
) -> Tensor:
    """By the extension, or in PyTorch where that does not know the types."""
    if q.dtype == torch.float16 or cache.k.dtype == torch.float8_e4m3fn:
        _check_positions(positions, q.shape[1], cache.k.shape[2], lengths, 0 if prefix is None else prefix.k.shape[2])
        return in_pytorch(q, k, v, cache, positions, prefix, lengths)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    n, window, n_head, head_dim = q.shape
    nothing = (0, 0, 0, 0)
    _C.decode_rows(
        devices.dtype_name(q), devices.dtype_name(cache.k), (n, window, n_head, head_dim),
        (q.data_ptr(), k.data_ptr(), v.data_ptr()),
        tuple(launch.row_stride(name, x) for name, x in (("q", q), ("k", k), ("v", v))),
        cache.addresses(), cache.k.shape[2], positions.data_ptr(),
        nothing if prefix is None else prefix.addresses(), 0 if prefix is None else len(prefix.k),
        0 if prefix is None else prefix.k.shape[2], 0 if lengths is None else lengths.data_ptr(),
        y.data_ptr(), isa, torch.get_num_threads(),
    )  # fmt: skip
    return y


def _on_gpu(
    q: Tensor, k: Tensor, v: Tensor, cache: Stored, positions: Tensor, prefix: Stored | None, lengths: Tensor | None
) -> Tensor:
    if cache.k.dtype == torch.float8_e4m3fn and not launch.stores_float8(q.device):
        raise ValueError("a float8_e4m3fn cache needs an NVIDIA GPU of compute capability 8.9 or later")
    _check_positions(positions, q.shape[1], cache.k.shape[2], lengths, 0 if prefix is None else prefix.k.shape[2])
    configs = devices.launch_configs(q)
    from fastigpt.kernels.decode_attention import decode_attention
    from fastigpt.kernels.kv_cache import append_kv
    from fastigpt.kernels.prefix_attention import make_prefix

    shared = None
    if prefix is not None:
        sources, window = len(prefix.k), q.shape[1]
        if lengths is None:
            lengths = torch.full((sources,), prefix.k.shape[2], dtype=torch.int32, device=q.device)
        shared = make_prefix(
            prefix.k, prefix.v, lengths, _sources(len(q), sources), window, configs, q.dtype, prefix.k_scale,
            prefix.v_scale,
        )  # fmt: skip
    with launching(q.device):
        append_kv(k, v, cache.k, cache.v, positions, cache.k_scale, cache.v_scale)
        return decode_attention(
            q, cache.k, cache.v, positions, configs=configs, k_scale=cache.k_scale, v_scale=cache.v_scale, prefix=shared
        )


def _fake(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, **others: Tensor | None
) -> Tensor:
    same_device(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, positions=positions, **others)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


register(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, *, "
    "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, Tensor? prefix_k=None, Tensor? prefix_v=None, "
    "Tensor? prefix_k_scale=None, Tensor? prefix_v_scale=None, Tensor? prefix_lengths=None) -> Tensor",
    _run,
    _fake,
)
