"""How a token is drawn: the noise contract, the filters, the draw. Plain PyTorch, the twin of every fused sampler.

The noise of (seed, image index, position, token) is fixed: Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", 2011) counts to it directly, so a draw does not depend on batch size, order, device or threads. Adding
Gumbel noise to logits and taking the argmax draws from their softmax (Gumbel, 1954).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastigpt.scalars import integer, real, shown, whole

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@dataclass(frozen=True)
class Drawing:
    """How the tokens of one canvas are drawn from their logits.

    seed: 0 … 2⁶⁴−1. temperature ≥ 0 (0: plain argmax). top_k ≥ 1 or None. top_p in (0, 1] or None.
    guidance_scale: logits are u + s·(c − u), c with the prefix, u with the negative one; None: no guidance.
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float | None = None


class Drawings:
    """The drawings of n canvases as tensors [n] on a device, so that canvases drawn in different ways share a batch."""

    def __init__(self, drawings: Sequence[Drawing], device: torch.device | str = "cpu") -> None:
        def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.seed_low = column([d.seed & _MASK for d in drawings], torch.int64)
        self.seed_high = column([d.seed >> 32 for d in drawings], torch.int64)
        self.temperature = column([d.temperature for d in drawings], torch.float32)
        # 0 and 1: all tokens.
        self.top_k = column([min(d.top_k or 0, 2**31 - 1) for d in drawings], torch.int64)
        self.top_p = column([1.0 if d.top_p is None else d.top_p for d in drawings], torch.float64)
        scales = [1.0 if d.guidance_scale is None else d.guidance_scale for d in drawings]
        self.guidance_scale = column(scales, torch.float32)

    def rows(self, index: torch.Tensor | slice) -> Drawings:
        """Those of the canvases `index`, int64 [m] or a slice."""
        some = Drawings(())
        vars(some).update({name: column[index] for name, column in vars(self).items()})
        return some

    def put(self, index: torch.Tensor, others: Drawings) -> None:
        """others' rows into rows `index`."""
        for name, column in vars(self).items():
            column[index] = getattr(others, name).to(column.device)


def philox4x32(
    counter: tuple[torch.Tensor, ...], key: tuple[int | torch.Tensor, int | torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10. counter: four int64 tensors of one shape holding 32-bit words; returns four like them. key: two
    such words, numbers or tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A 32 × 32 bit product wraps in int64, but its low and high halves come out right with a mask.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & _MASK, (p1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _MASK, high0 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def noise_bits(
    seed: int | tuple[torch.Tensor, torch.Tensor], index: torch.Tensor, position: torch.Tensor, n_tokens: int
) -> torch.Tensor:
    """int64 [..., n_tokens]: the 32 random bits of every token. index, position: int64, broadcast against each other.
    seed: a number, or its low and high 32 bits as int64 tensors that broadcast likewise.

    key = the 64-bit seed, counter = (token // 4, position, index low, index high), word token % 4.
    """
    index, position = torch.broadcast_tensors(index, position)
    shape = (*index.shape, (n_tokens + 3) // 4)
    block = torch.arange(shape[-1], device=index.device).expand(shape)
    key: tuple[int | torch.Tensor, int | torch.Tensor]
    if isinstance(seed, int):
        key = seed & _MASK, seed >> 32
    else:
        key = seed[0].unsqueeze(-1), seed[1].unsqueeze(-1)
    words = philox4x32(
        (
            block,
            position.unsqueeze(-1).expand(shape),
            (index & _MASK).unsqueeze(-1).expand(shape),
            ((index >> 32) & _MASK).unsqueeze(-1).expand(shape),
        ),
        key,
    )
    return torch.stack(words, dim=-1).flatten(-2)[..., :n_tokens]


def gumbel_noise(
    seed: int | tuple[torch.Tensor, torch.Tensor], index: torch.Tensor, position: torch.Tensor, n_tokens: int
) -> torch.Tensor:
    """float32 [..., n_tokens]: g = −log(−log u), u = (bits >> 8 + 0.5) · 2⁻²⁴, in float64 and then rounded.

    float64 because u has 25 significant bits: in float32 the largest u would be 1 and its g infinite.
    """
    device = index.device
    if device.type == "mps":  # has no float64
        seed = seed if isinstance(seed, int) else (seed[0].cpu(), seed[1].cpu())
        return gumbel_noise(seed, index.cpu(), position.cpu(), n_tokens).to(device)
    uniform = ((noise_bits(seed, index, position, n_tokens) >> 8).double() + 0.5) * 2.0**-24
    return (-torch.log(-torch.log(uniform))).float()


def filter_logits(logits: torch.Tensor, drawings: Drawing | Drawings) -> torch.Tensor:
    """float32 [n, ..., V]: logits / temperature, −inf where top-k or top-p forbid a token. Drawings: those of the n
    canvases; a Drawing: of all.

    Temperature, then top-k, then top-p, each with the semantics of transformers' processors: tokens as good as the k-th
    stay; top-p removes the least likely while their probabilities sum to at most 1 − top_p and keeps at least one. Of
    equally likely tokens the lower goes first. Temperature 0 leaves the logits as they are: the draw is then their
    argmax.
    """
    if isinstance(drawings, Drawing):
        drawings = Drawings([drawings], logits.device)
    scores, n_tokens, ndim = logits.float(), logits.shape[-1], logits.ndim
    scores = scores / _column(torch.where(drawings.temperature > 0, drawings.temperature, 1.0), ndim)
    filtered = (drawings.top_k > 0) & (drawings.top_k < n_tokens)
    if bool(filtered.any()):
        k = _column(torch.where(filtered, drawings.top_k, n_tokens), ndim)
        best = scores.topk(int(torch.where(filtered, drawings.top_k, 1).max()), dim=-1).values
        kth = best.gather(-1, (k.clamp(max=best.shape[-1]) - 1).expand(*scores.shape[:-1], 1))
        scores = scores.masked_fill((scores < kth) & (k < n_tokens), -math.inf)
    if bool((drawings.top_p < 1.0).any()):
        ascending, order = scores.sort(dim=-1, stable=True)
        remove = ascending.softmax(-1).cumsum(-1) <= _column((1.0 - drawings.top_p).float(), ndim)
        remove &= _column(drawings.top_p < 1.0, ndim)
        remove[..., -1] = False
        scores = scores.masked_fill(torch.zeros_like(remove).scatter(-1, order, remove), -math.inf)
    return scores


def _column(values: torch.Tensor, ndim: int) -> torch.Tensor:
    """One value for each canvas, or one for all, against tensors [n, …] of `ndim` dimensions."""
    return values.view(-1, *[1] * (ndim - 1)) if ndim else values[0]


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance: u + s·(c − u) on logits (Ho and Salimans, 2022)."""
    return unconditional + scale * (conditional - unconditional)


def draw(
    logits: torch.Tensor, index: torch.Tensor, position: torch.Tensor, drawings: Drawing | Drawings
) -> torch.Tensor:
    """int64 [n, ...]: one token for each row of logits [n, ..., V]. index, position: int64, broadcast to [n, ...].
    Drawings: those of the n canvases; a Drawing: of all."""
    if isinstance(drawings, Drawing):
        drawings = Drawings([drawings], logits.device)
    scores = filter_logits(logits, drawings)
    if bool((drawings.temperature > 0).any()):
        lead = logits.ndim - 1
        seed = _column(drawings.seed_low, lead), _column(drawings.seed_high, lead)
        noise = gumbel_noise(seed, index, position, logits.shape[-1])
        scores = scores + torch.where(_column(drawings.temperature, logits.ndim) > 0, noise, 0.0)
    return scores.argmax(-1)


def fresh_seed() -> int:
    """A seed from the operating system, for callers who gave none. Below 2⁶³, so that it fits every file format."""
    return int(torch.randint(0, 2**63 - 1, (), generator=_system_generator(), device="cpu"))


def seed_of(generator: torch.Generator) -> int:
    """A seed from a generator of the caller's."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, not {shown(generator)}")
    return int(torch.randint(0, 2**63 - 1, (), generator=generator, device=generator.device))


def _system_generator() -> torch.Generator:
    generator = torch.Generator("cpu")
    generator.seed()
    return generator


# Logits are float32, and so is all that is done to them: u + s·(c − u), then division by the temperature. With a scale
# of at most 2¹⁰⁰ and a temperature of at least max(1, scale) / 2¹⁰⁰, logits of up to 2²⁵ stay finite on the way. At
# lower temperatures they would not, and the noise, at most 17.4, has long vanished beside them: the draw is its limit,
# the argmax. A larger scale or temperature than float32 can work with is refused: there is no such limit to go to.
MAX_GUIDANCE = 2.0**100
MAX_TEMPERATURE = torch.finfo(torch.float32).max
_SMALLEST_TEMPERATURE = 2.0**-100
_MOST_TOKENS = 2**31 - 1  # that any model has: a top-k of more is the same, and fits every engine's integers


def checked_drawing(
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float | None = None,
) -> Drawing:
    """A Drawing that means the same to all engines and operators, or a TypeError or ValueError that names the argument,
    what was given and what is allowed.

    seed: 0 … 2⁶⁴ − 1. temperature: 0 … 3.4e38, float32's largest; below max(1, guidance_scale) / 2¹⁰⁰ (8e-31 without
    guidance) it is 0, the argmax. top_k ≥ 1. top_p in (0, 1]. guidance_scale: 0 … 2¹⁰⁰. Numbers may be Python's or
    numpy's, or arrays or tensors of one element.
    """
    seed = integer("seed", seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be between 0 and 2**64 - 1, not {shown(seed)}")
    temperature = real("temperature", temperature)
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"temperature must be finite, at least 0 and at most {MAX_TEMPERATURE:.7g}, not {temperature}")
    if top_k is not None:
        top_k = min(whole("top_k", top_k, 1, expected="an int or None"), _MOST_TOKENS)
    if top_p is not None:
        top_p = real("top_p", top_p, "a number or None")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if guidance_scale is not None:
        guidance_scale = real("guidance_scale", guidance_scale, "a number or None")
        if not 0 <= guidance_scale <= MAX_GUIDANCE:
            raise ValueError(
                f"guidance_scale must be finite, at least 0 and at most {MAX_GUIDANCE:.7g}, not {guidance_scale}"
            )
    if temperature < _SMALLEST_TEMPERATURE * max(1.0, guidance_scale or 0.0):
        temperature = 0.0
    return Drawing(seed, temperature, top_k, top_p, guidance_scale)
