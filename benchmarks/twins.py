"""How far a kernel's result is from its plain twin's, for a call that is about to be timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastigpt.ops.causal_attention import causal_attention_reference
from fastigpt.ops.decode_attention import decode_attention_reference
from fastigpt.ops.norm_linear import norm_linear_reference

_HOW = ("configs", "config", "scratch")  # arguments that say how a kernel works, not what it computes


def difference(call: partial[torch.Tensor]) -> float:
    """Runs a partial of a kernel's launcher and its twin on the same arguments: the largest difference over the largest
    result. NaN where the kernel left out part of its result, which held NaN before."""
    twin, place = _TWINS[call.func.__name__]
    args, what = list(call.args), {name: x for name, x in call.keywords.items() if name not in _HOW}
    out = what.pop("out") if place is None else args[place]
    if not what.get("residual"):  # that is added to what is there
        out.fill_(float("nan"))
    if place is not None:
        args[place] = out.clone()
    expected, found = twin(*args, **what).float(), call().float()
    return float((found - expected).abs().max() / expected.abs().max())


# Of each launcher its twin, and the place of the argument that both write to; None: the kernel to `out`, the twin to
# something new.
_TWINS: dict[str, tuple[Callable[..., Any], int | None]] = {
    "norm_linear": (norm_linear_reference, 2),
    "decode_attention": (decode_attention_reference, None),
    "causal_attention": (causal_attention_reference, None),
}
