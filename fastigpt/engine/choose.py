"""Which backends there are, which of them run here, and how one is made. The choice is made once, when a model is
built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastigpt.engine import Engine
from fastigpt.engine.blocks import require, why_unsupported
from fastigpt.kernels import launch
from fastigpt.scalars import shown
from fastigpt.spec import ModelSpec

# Fastest first of those that run on a device: cpu runs on CPUs only, and triton there only in its interpreter.
BACKENDS = ("cpu", "triton", "portable", "reference")

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "fp8": torch.float8_e4m3fn,
}


def as_device(device: torch.device | str | None) -> torch.device:
    """A torch device that exists here; None: CUDA if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be a torch device such as 'cpu' or 'cuda:0', not {shown(device)}") from None
    if found.type == "cpu":
        return torch.device("cpu")
    module: Any = getattr(torch, found.type, None)  # torch.cuda, torch.xpu, torch.mps; the meta device has none
    count = module.device_count() if hasattr(module, "device_count") and module.is_available() else 0
    if (found.index or 0) >= count:
        seen = f"{count} of them" if count else f"no {found.type.upper()} device"
        raise ValueError(f"device is {str(found)!r}, but torch {torch.__version__} sees {seen} here")
    return found


def as_dtype(dtype: torch.dtype | str | None, name: str = "dtype") -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(DTYPES)} or a torch.dtype, not {shown(dtype)}")
    return DTYPES[dtype]


def why_unavailable(backend: str, device: torch.device) -> str | None:
    """A sentence that says why a backend can't run on a device, or None if it can."""
    if backend == "cpu" and device.type != "cpu":
        return "it runs on CPUs only"
    if backend == "triton":
        return launch.why_unavailable(device)
    return None


def choose(device: torch.device, spec: ModelSpec | None = None) -> str:
    """What "auto" means: the first backend of BACKENDS that runs on this device, and there this model."""
    return next(
        name
        for name in BACKENDS
        if why_unavailable(name, device) is None and (spec is None or why_unsupported(name, spec) is None)
    )


def build(
    spec: ModelSpec,
    weights: Mapping[str, torch.Tensor],
    *,
    backend: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    kv_dtype: torch.dtype | str | None = None,
) -> Engine:
    """An engine with these weights, named as spec.weight_shapes() says.

    Raises ValueError if the backend that was named can't run; only "auto" chooses.
    """
    place, number, cache = as_device(device), as_dtype(dtype), as_dtype(kv_dtype, "kv_dtype")
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, not {shown(backend)}")
    if backend == "auto":
        backend = choose(place, spec)
    elif backend not in BACKENDS:
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}, not {shown(backend)}")
    reason = why_unavailable(backend, place)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run on {place}: {reason}")
    require(backend, spec)
    # Imported where they are chosen: triton is not everywhere, and none of them is needed by the others.
    if backend == "triton":
        from fastigpt.engine.triton import TritonEngine

        return TritonEngine(spec, weights, device=place, dtype=number, kv_dtype=cache)
    if backend == "reference":
        from fastigpt.engine.reference import ReferenceEngine

        return ReferenceEngine(spec, weights, device=place, dtype=number, kv_dtype=cache)
    if backend == "cpu":
        from fastigpt.engine.cpu import CpuEngine

        return CpuEngine(spec, weights, dtype=number, kv_dtype=cache)
    from fastigpt.engine.portable import PortableEngine

    return PortableEngine(spec, weights, device=place, dtype=number, kv_dtype=cache)
