"""What this machine and this installation can do: versions, devices, backends and why each is or isn't available."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastigpt import _C
from fastigpt.api import load
from fastigpt.engine.choose import BACKENDS, as_device, choose, why_unavailable
from fastigpt.engine.memory import free_memory

_PACKAGES = ("fastigpt", "torch", "triton", "transformers", "numpy", "safetensors", "huggingface_hub")


def collect() -> dict[str, Any]:
    """All of it, as plain values that JSON can hold."""
    device = as_device(None)
    model = load()
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cpu": {
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "instruction_sets": _C.supported_isas(),
            "free_memory_bytes": free_memory(torch.device("cpu")),
        },
        "extension": {"cuda": bool(_C.has_cuda)},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "device": str(device),
        "backends": {name: why_unavailable(name, device) or "available" for name in BACKENDS},
        "auto": choose(device),
        "bundled_model": {
            "size": repr(model),
            "parameters": model.config.n_parameters(),
            "dtype": str(model.dtype),
            "kv_dtype": str(model.engine.kv_dtype),
            "reads_prompts": model.vocabulary is not None,
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
