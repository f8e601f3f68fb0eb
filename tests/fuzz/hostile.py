"""Values that nobody should hand over, for arguments that want a number, a text, a tensor; and tensors made hostile."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from harness import Case

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint64,
]  # fmt: skip
NUMBERS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 17, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**30,
    10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-320, 1e-38, 1e-30, 1e30, 1e38, 3.4e38, 1e39, 1e308, math.nan, math.inf,
    -math.inf, np.int64(2), np.int8(-1), np.uint64(2**64 - 1), np.float32(0.5), np.float16(0.1), np.float64("nan"),
    np.bool_(True), np.array(1), np.array(0.5), np.array([1]), np.array([]), Fraction(1, 2), Decimal("0.5"),
    Decimal("NaN"), 1j, torch.tensor(1), torch.tensor(0.5), torch.tensor([1, 2]), torch.tensor(True),
    torch.empty((), device="meta"),
]  # fmt: skip
OTHERS: list[Any] = [
    "", "0", "1", "auto", "a\0b", "\ud800", "é" * 300, b"", b"1", [], [1], [None], (), {}, {"a": 1}, set(), object(),
    range(3), range(0), int, Ellipsis, NotImplemented, lambda: 1, iter([1]), memoryview(b"ab"), slice(None),
]  # fmt: skip


def value(case: Case) -> Any:
    return case.choice(NUMBERS if case.random() < 0.7 else OTHERS)


def tensor(case: Case, x: torch.Tensor) -> Any:
    """x after one or two twists; sometimes no tensor at all."""
    if case.random() < 0.04:
        return value(case)
    for _ in range(case.choice([1, 1, 2])):
        twist = case.choice(TWISTS)
        try:
            x = twist(case, x)
        except Exception:
            continue  # this twist does not go with what x already is
        if twist is _without_storage:
            break  # PyTorch itself crashes on what reads it
    return x


def harmless(x: Any) -> Any:
    """A plain copy with the same values, whatever the strides and lazy bits of x; NaN and infinities stay."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().resolve_conj().resolve_neg().contiguous().clone()


def without_values(x: Any) -> bool:
    """Whether x is a tensor whose memory is not there to be copied."""
    if not isinstance(x, torch.Tensor):
        return False
    return x.is_meta or x.layout != torch.strided or x.is_nested or (x.numel() > 0 and x.untyped_storage().size() == 0)


def _dtype(case: Case, x: torch.Tensor) -> torch.Tensor:
    return x.to(case.choice(DTYPES))


def _negated(case: Case, x: torch.Tensor) -> torch.Tensor:
    """The same values behind a lazy minus sign."""
    if case.random() < 0.5:
        return torch._neg_view(-x)
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def _conjugated(case: Case, x: torch.Tensor) -> torch.Tensor:
    return torch.complex(x, x).conj()


def _meta(case: Case, x: torch.Tensor) -> torch.Tensor:
    return x.to("meta")


def _without_storage(case: Case, x: torch.Tensor) -> torch.Tensor:
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    return freed


def _sparse(case: Case, x: torch.Tensor) -> torch.Tensor:
    return case.choice([torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn])(x)


def _nested(case: Case, x: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(x))


def _transposed(case: Case, x: torch.Tensor) -> torch.Tensor:
    order = list(range(x.dim()))
    case.shuffle(order)
    return x.permute(order) if case.random() < 0.3 else x.permute(order).contiguous().permute(*np.argsort(order))


def _strided(case: Case, x: torch.Tensor) -> torch.Tensor:
    """The same values with gaps between them."""
    axis = case.randrange(x.dim())
    wide = torch.repeat_interleave(x, 2, axis)
    return wide.movedim(axis, 0)[::2].movedim(0, axis)


def _repeated(case: Case, x: torch.Tensor) -> torch.Tensor:
    """Strides of zero."""
    axis = case.randrange(x.dim())
    return x.narrow(axis, 0, 1).expand(x.shape)


def _offset(case: Case, x: torch.Tensor) -> torch.Tensor:
    """An address that is a multiple of nothing but the element's size."""
    flat = torch.cat([x.new_zeros(1), x.flatten()])
    return flat[1:].view(x.shape)


def _shape(case: Case, x: torch.Tensor) -> torch.Tensor:
    kind = case.randrange(6)
    axis = case.randrange(max(1, x.dim()))
    if kind == 0:
        return x[:0]
    if kind == 1:
        return x.unsqueeze(axis)
    if kind == 2:
        return x.select(axis, 0)
    if kind == 3:
        return torch.cat([x, x], axis)
    if kind == 4:
        return x.flatten()
    return x.narrow(axis, 0, x.shape[axis] - 1)


def _special(case: Case, x: torch.Tensor) -> torch.Tensor:
    """One value that is not finite or not in range."""
    x = x.clone()
    bad: list[Any] = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45]
    if not x.is_floating_point():
        bad = [-1, -2, 127, torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max]
    x.view(-1)[case.randrange(x.numel())] = case.choice(bad)
    return x


def _extreme(case: Case, x: torch.Tensor) -> torch.Tensor:
    return x * case.choice([0, 1e-42, 1e20, 1e38, -1])


def _graph(case: Case, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(x) if case.random() < 0.5 else x.clone().requires_grad_() * 1


TWISTS: list[Callable[[Case, torch.Tensor], torch.Tensor]] = [
    _dtype, _negated, _conjugated, _meta, _without_storage, _sparse, _nested, _transposed, _strided, _repeated, _offset,
    _shape, _special, _extreme, _graph,
]  # fmt: skip
