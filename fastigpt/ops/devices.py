"""Who serves an operator's tensors: Triton's kernels, with the launch configurations of their device, or the CPU."""

from __future__ import annotations

import torch

from fastigpt.kernels import launch


def by_triton(x: torch.Tensor) -> bool:
    return x.is_cuda


def launch_configs(x: torch.Tensor) -> launch.Table:
    """RuntimeError where kernels cannot run. Launches of operators are kept apart: what one reads before it waits for
    the launch before it may be what that writes, where the caller is not our engine."""
    reason = launch.why_unavailable(x.device)
    if reason is not None:
        raise RuntimeError(f"fastigpt's operators cannot run on {x.device}: {reason}")
    return {**launch.table(launch.family(x.device)), "overlap": [{"launches": False}]}


def dtype_name(x: torch.Tensor) -> str:
    """As the extension calls it: "float32"."""
    return str(x.dtype).removeprefix("torch.")
