"""Training in its own arithmetic, whatever the caller has set in torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """With gradients and without the caller's autocast; tensors without a device are on the CPU. (The default dtype is
    the whole process's, so that networks name theirs instead.)"""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # A device context makes every call of torch slower, so there is one only where it is needed.
        elsewhere = torch.get_default_device().type != "cpu"
        with (
            torch.device("cpu") if elsewhere else nullcontext(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            return function(*args, **kwargs)

    return run
