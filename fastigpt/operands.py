"""What every operator asks of a tensor before it is read by its address: that its numbers are there.

They need not be: a tensor can be on the meta device, sparse, quantised or a subclass without memory, its storage may
have been freed or cut, and a lazily negated or conjugated view (`z.conj().imag`) means other numbers than its memory
holds.
"""

from __future__ import annotations

from typing import Any

import torch

DEVICES = ("cpu", "cuda")


def readable(name: str, x: Any) -> torch.Tensor:
    """x itself, or a copy of a lazily negated or conjugated one: dense, on the CPU or on CUDA, with memory.

    TypeError for what is no such tensor, ValueError for another device and for memory that is not there.
    """
    check_memory(name, x)
    return x.resolve_conj().resolve_neg()


def writable(name: str, x: Any) -> torch.Tensor:
    """x, which is to be changed in place: as `readable`, but a lazily negated or conjugated view is a ValueError."""
    check_memory(name, x)
    if x.is_neg() or x.is_conj():
        raise ValueError(f"{name} is changed in place and must not be a lazily negated or conjugated view")
    return x


def check_memory(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, not {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, not {'nested' if x.is_nested else x.layout}")
    if x.is_quantized:
        raise TypeError(f"{name} must not be quantised, but is {x.dtype}")
    if x.device.type not in DEVICES:
        raise ValueError(f"{name} must be on the CPU or on a CUDA device, not on {x.device}")
    count = x.numel()
    if count == 0:
        return
    try:
        address, held = x.data_ptr(), x.untyped_storage().nbytes()
    except RuntimeError:  # FakeTensor and other subclasses that stand for a tensor
        raise TypeError(f"{name} must be a tensor with memory of its own, not {type(x).__name__}") from None
    if not x.is_contiguous():
        count = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    needed = (x.storage_offset() + count) * x.element_size()
    if address == 0 or needed > held:
        raise ValueError(
            f"{name} must have its memory, but of {needed} bytes its storage holds {held if address else 0}"
        )


def contiguous(name: str, x: torch.Tensor) -> None:
    """ValueError unless the numbers lie in order, without gaps."""
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not strides {list(x.stride())}")


def same_device(**tensors: torch.Tensor | None) -> None:
    """ValueError unless all are on one device."""
    if len({x.device for x in tensors.values() if x is not None}) > 1:
        found = ", ".join(f"{name} on {x.device}" for name, x in tensors.items() if x is not None)
        raise ValueError(f"all tensors must be on one device, not {found}")


def operands(
    changed: tuple[str, ...] = (), optional: tuple[str, ...] = (), /, **tensors: torch.Tensor | None
) -> list[Any]:
    """The tensors of one call in order, all on one device, each `readable`, those named in `changed` `writable`. None
    stays None where it is `optional`."""
    same_device(**tensors)
    found: list[Any] = []
    for name, x in tensors.items():
        if x is None and name in optional:
            found.append(None)
        else:
            found.append((writable if name in changed else readable)(name, x))
    return found
