"""Norm, head, filters and draw: from hidden states to tokens by the noise contract."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastigpt import _C
from fastigpt.formulas import rms_norm
from fastigpt.kernels.launch import PLAIN_TYPES
from fastigpt.kernels.launching import launching
from fastigpt.operands import operands, same_device
from fastigpt.ops import devices
from fastigpt.ops.checks import OPTIONAL, check_dtype, check_shape, need_tensors
from fastigpt.ops.register import register
from fastigpt.sampling import Drawing, checked_drawing, draw, guide
from fastigpt.scalars import integer, real, shown

Tensor = torch.Tensor


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
    need_tensors(
        hidden=hidden, gain=gain, weight=weight, index=index, position=position, known=known,
        unconditional=unconditional,
    )  # fmt: skip
    if not torch.compiler.is_compiling():  # there they are what they are; the schema takes less than these
        seed = _signed(seed)
        temperature, guidance_scale = real("temperature", temperature), real("guidance_scale", guidance_scale)
        top_k = None if top_k is None else min(integer("top_k", top_k, "an int or None"), 2**63 - 1)
        top_p = None if top_p is None else real("top_p", top_p, "a number or None")
        epsilon = real("epsilon", epsilon)
    return torch.ops.fastigpt.sample_head(
        hidden, gain, weight, index, position, seed, temperature=temperature, top_k=top_k, top_p=top_p, known=known,
        unconditional=unconditional, guidance_scale=guidance_scale, epsilon=epsilon,
    )  # fmt: skip


def head_logits(x: Tensor, gain: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """float32 [rows, tokens] from hidden states [rows, width]: final norm and head."""
    return rms_norm(x.float(), gain.float(), epsilon) @ weight.float().T


def sample_head_reference(
    hidden: Tensor,
    gain: Tensor,
    weight: Tensor,
    index: Tensor,
    position: Tensor,
    unconditional: Tensor | None,
    drawing: Drawing,
    epsilon: float,
) -> Tensor:
    """The plain twin, where nothing is known."""
    logits = head_logits(hidden, gain, weight, epsilon)
    if unconditional is not None and drawing.guidance_scale is not None:
        logits = guide(logits, head_logits(unconditional, gain, weight, epsilon), drawing.guidance_scale)
    return draw(logits, index, position, drawing)


def _signed(seed: int) -> int:
    number = seed if isinstance(seed, torch.SymInt) else integer("seed", seed)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be between -2**63 and 2**64 - 1, not {shown(number)}")
    return number - 2**64 if number >= 2**63 else number


def _check(
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
    check_shape("gain", gain, (width,))
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(f"weight must be [colours, {width}], not {list(weight.shape)}")
    check_shape("weight", weight, (weight.shape[0], width))
    for name, x in (("hidden", hidden), ("gain", gain), ("weight", weight)):
        check_dtype(name, x, *PLAIN_TYPES)
    for name, tensor in (("index", index), ("position", position), ("known", known)):
        if tensor is not None:
            check_shape(name, tensor, (n,))
            check_dtype(name, tensor, torch.int64)
    if unconditional is not None:
        check_shape("unconditional", unconditional, (n, width))
        check_dtype("unconditional", unconditional, hidden.dtype)


def _run(
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
        (), OPTIONAL, hidden=hidden, gain=gain, weight=weight, index=index, position=position, known=known,
        unconditional=unconditional,
    )  # fmt: skip
    _check(hidden, gain, weight, index, position, known, unconditional)
    scale = None if unconditional is None else guidance_scale
    drawing = checked_drawing(seed % 2**64, temperature, top_k, top_p, scale)
    checked_drawing(0, guidance_scale=guidance_scale)  # one that is not used must be right, too
    sample = _on_gpu if devices.by_triton(hidden) else on_cpu
    tokens = sample(hidden, gain, weight, index, position, unconditional, drawing, epsilon)
    return tokens if known is None else torch.where(known >= 0, known, tokens)


def on_cpu(
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
    """By the extension, which reads float32 and bfloat16."""
    tokens = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    # Named, so that copies live until the call is done.
    hidden, weight, index, position = _readable(hidden), _readable(weight), index.contiguous(), position.contiguous()
    gain = gain.float().contiguous()
    without = None if unconditional is None else _readable(unconditional)
    scale = 1.0 if drawing.guidance_scale is None else drawing.guidance_scale
    _C.sample_rows(
        devices.dtype_name(hidden), devices.dtype_name(weight), (*hidden.shape, len(weight)), hidden.data_ptr(),
        0 if without is None else without.data_ptr(), gain.data_ptr(), weight.data_ptr(), index.data_ptr(),
        position.data_ptr(), epsilon, drawing.seed, drawing.temperature, drawing.top_k or 0,
        1.0 if drawing.top_p is None else drawing.top_p, scale, tokens.data_ptr(), isa, torch.get_num_threads(),
    )  # fmt: skip
    return tokens


def _readable(x: Tensor) -> Tensor:
    return (x.float() if x.dtype == torch.float16 else x).contiguous()


def _on_gpu(
    hidden: Tensor,
    gain: Tensor,
    weight: Tensor,
    index: Tensor,
    position: Tensor,
    unconditional: Tensor | None,
    drawing: Drawing,
    epsilon: float,
) -> Tensor:
    configs = devices.launch_configs(hidden)
    from fastigpt.kernels.canvases import Canvases, Head, Steps, repeated
    from fastigpt.kernels.sample_head import make_scratch, sample_head

    n, device = len(hidden), hidden.device
    x = hidden if unconditional is None else torch.cat([hidden, unconditional])
    head = Head(gain.contiguous(), weight.contiguous(), weight, weight, epsilon)
    # One canvas for each draw, of one token that is not known: known tokens are put in by the caller.
    canvases = replace(
        Canvases.idle(n, 1, device), position=position.int(), index=index.contiguous(),
        guided=torch.full((n,), int(unconditional is not None), dtype=torch.int32, device=device),
        drawings=repeated(drawing, n, device),
    )  # fmt: skip
    steps = Steps.of([drawing], len(weight))
    inputs = torch.zeros((n, 1), dtype=torch.int32, device=device)
    with launching(hidden.device):
        scratch = make_scratch(n, 1, head, steps, configs)
        sample_head(x.float().contiguous(), inputs, head, canvases, scratch, steps, configs=configs, advance=False)
    return scratch.chosen[:, 0].long()


def _fake(
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


register(
    "sample_head(Tensor hidden, Tensor gain, Tensor weight, Tensor index, Tensor position, SymInt seed, *, "
    "float temperature=1.0, SymInt? top_k=None, float? top_p=None, Tensor? known=None, "
    "Tensor? unconditional=None, float guidance_scale=1.0, float epsilon=1e-05) -> Tensor",
    _run,
    _fake,
)
