"""Arrays of any framework as the extension wants them: addresses, shapes and strides, so that nothing is copied."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

import fastigpt._C as _C
from fastigpt.operands import readable
from fastigpt.scalars import whole

_DTYPES = ("uint8", "float16", "bfloat16", "float32")
_OF_NUMPY = {np.dtype(name): name for name in _DTYPES if name != "bfloat16"}
_OF_TORCH = {getattr(torch, name): name for name in _DTYPES}
_CPU = torch.device("cpu")
_MAX_CUDA_AXES = 3  # kMaxAxes in csrc/include/fastigpt/nearest_centroid.h


class Described(NamedTuple):
    """What the extension needs to know of an array. Strides in bytes; `owner` keeps the memory alive."""

    owner: np.ndarray | torch.Tensor
    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device


def describe(name: str, array: Any) -> Described:
    """Address, dtype, shape and strides of an array, uncopied (but for a lazily negated view)."""
    if not isinstance(array, (np.ndarray, torch.Tensor)):
        if hasattr(array, "__cuda_array_interface__"):
            if not torch.cuda.is_available():
                raise ValueError(f"{name} must be on a device that torch sees, which is no CUDA device")
            array = torch.as_tensor(array, device="cuda")
        elif hasattr(array, "__dlpack__"):
            array = torch.from_dlpack(array)
        else:
            raise TypeError(f"{name} must be a numpy array, a torch tensor or the like, not {type(array).__name__}")
    if isinstance(array, np.ndarray):
        dtype = _OF_NUMPY.get(array.dtype)
        if dtype is None:
            raise TypeError(f"{name} must be one of {', '.join(_DTYPES)}, not {array.dtype}; convert with .astype()")
        return Described(array, address_of(array), dtype, array.shape, array.strides, _CPU)
    dtype = _OF_TORCH.get(array.dtype)
    if dtype is None:
        found = str(array.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be one of {', '.join(_DTYPES)}, not {found}; convert with .to()")
    array = readable(name, array)
    size = array.element_size()
    strides = tuple([step * size for step in array.stride()])
    return Described(array, array.data_ptr(), dtype, tuple(array.shape), strides, array.device)


def address_of(array: np.ndarray) -> int:
    return _C.address_of(array)


def few_axes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if its points lie on more than the three axes that the CUDA kernels walk along."""
    axes = 0
    outer: int | None = None  # stride that the next axis must fill out to be one run with those before it
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]):
        axes += outer != size * stride
        outer = stride
    return tensor if axes <= _MAX_CUDA_AXES else tensor.contiguous()


def require_cuda() -> None:
    if not _C.has_cuda:
        raise ValueError("points are on a CUDA device, but fastigpt was built without CUDA (nvcc was not found)")


def check_threads(threads: int | None) -> int:
    """threads as the extension wants it: 0 = all cores."""
    return 0 if threads is None else whole("threads", threads, 1, _C.MAX_THREADS, "an int or None")


def like(points: Any, values: Any) -> Any:
    """values, a numpy array or torch tensor, in the framework of points."""
    if isinstance(points, np.ndarray):
        return values
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if isinstance(points, torch.Tensor) or not hasattr(points, "__array_namespace__"):
        return tensor
    return points.__array_namespace__().from_dlpack(tensor)
