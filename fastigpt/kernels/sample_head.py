"""From the hidden states of a window to decided tokens and the next window's inputs.

Final norm, head, guidance, temperature, top-k, top-p, noise, argmax, known tokens, which guesses were right, and the
embeddings of the next inputs, each canvas in its own way. A hidden layer of the head is a launch of its own before. The
tokens of the vocabulary are split over TILES programs for each block of canvases: each scores its own, with their
noise, and leaves partial maxima; the last to finish chooses. Filters read the scores again, in a second launch whose
programs take few rows each (kernels/choose_rows.py). Positions, tokens and noise counters live on the device, so a
captured graph can be replayed without the host.

The window of canvas b scores positions position[b] … position[b] + W − 1. Its inputs are the token before and W − 1
guesses. The draw at a position depends only on the tokens before it, so it stands if all guesses before it were equal
to their draws: that many tokens are kept, up to end[b], and the next window starts behind them. Its guesses are the
draws that were not kept, then draws from the last row's logits with the noise of the position they are for
(fixed-point sampling; Wiggers and Hoogeboom 2020, arXiv 2002.09928). W = 1 is plain decoding.

The plain twin is in fastigpt/ops/pass_end.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastigpt.kernels.advance import choose, finish, rows_of
from fastigpt.kernels.canvases import Canvases, Head, Steps
from fastigpt.kernels.choose_rows import choose_rows, filter_warps
from fastigpt.kernels.launch import Table, expect, expect_contiguous, settings
from fastigpt.kernels.noise import gumbel
from fastigpt.kernels.norm_linear import norm_linear
from fastigpt.kernels.overlap import begin, overlap
from fastigpt.kernels.products import FIRST, SLICES, load_gain, load_weights, prefetch_weights, sum_products


@triton.jit
def _logits(
    x, gain, weight, shift, row, ok, token, w_first, g_first, epsilon,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    # Final norm and head for some rows and tokens; the norm's factor is applied to the products.
    logits, squares = sum_products(
        x, gain, weight, row, ok, token, token < TOKENS, w_first, g_first, WIDTH, NORM, BLOCK_K, STAGES, EARLY,
        weight.dtype.element_ty,
    )  # fmt: skip
    if NORM:
        logits *= tl.rsqrt(squares / WIDTH + epsilon)[:, None]
    if BIAS:
        logits += shift[None, :]
    return logits


@triton.jit
def _best_of_tile(value, tile, row, rows_total, part_score, part_token, tiles, ahead: tl.constexpr, C: tl.constexpr):
    # The partial maximum of each row, of equal scores the lowest token.
    best, at = tl.max(value, axis=1, return_indices=True)
    place = (ahead * rows_total + row) * tiles + tile
    tl.store(part_score + place, best)
    tl.store(part_token + place, tile * C + at.to(tl.int32))


@triton.jit
def _best_of_row(row, part_score, part_token, TILES: tl.constexpr, BLOCK_T: tl.constexpr):
    # int32 [R]: the token of the largest partial maximum; row: where its partial maxima are.
    most = tl.full([row.shape[0]], float("-inf"), tl.float32)
    token = tl.zeros([row.shape[0]], tl.int32)
    for t0 in range(0, TILES, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        place = row[:, None] * TILES + t[None, :]
        there = (t < TILES)[None, :]
        score = tl.load(part_score + place, mask=there, other=float("-inf"), cache_modifier=".cg")
        tokens = tl.load(part_token + place, mask=there, other=0, cache_modifier=".cg")
        best, at = tl.max(score, axis=1, return_indices=True)
        found = tl.sum(tl.where(tl.arange(0, BLOCK_T)[None, :] == at[:, None], tokens, 0), axis=1)
        token = tl.where(best > most, found, token)
        most = tl.maximum(most, best)
    return token


@triton.jit
def _sample_head(
    x,  # float32 [lanes * W, WIDTH]; lanes = n, or 2 n if GUIDED: with the prefix, then with the negative one
    hidden,  # [lanes * W, INNER]: what weight multiplies, x itself if NORM
    gain,  # [WIDTH], used if NORM
    weight,  # [TOKENS, INNER]
    bias,  # [TOKENS], used if BIAS
    wte,  # [TOKENS, WIDTH]
    wpe,  # [n_positions, WIDTH], or None
    canvas,  # int32 [n, n_positions], -1 = not decided yet
    pass_starts,  # int8 [n, n_positions]
    position,  # int32 [n]: first position of the window
    end,  # int32 [n]: where drawing ends; a canvas whose position is not before it is idle
    inputs,  # int32 [n, W]
    slots,  # int32 [2 n]: cache slot of the window's first input; -1 = idle
    offset,  # int32 [2 n]: slot = position - offset
    index,  # int64 [n]: image index of the noise contract
    seed_low,  # int64 [n]
    seed_high,  # int64 [n]
    temperature,  # float32 [n]
    scale,  # float32 [n]: of guidance
    guided,  # int32 [n]
    scored,  # int32 [n]
    log_likelihood,  # float64 [n]
    failed,  # int32 [n]: becomes 1 where logits that decide a token are not finite
    scores,  # float32 scratch [rows_total, V], if filtered; rows_total = n_blocks * BLOCK_R
    noise,  # float32 scratch [2, rows_total, V], if filtered
    part_score,  # float32 scratch [2, rows_total, TILES], if not: of the window, then of the positions behind it
    part_token,  # int32 scratch, likewise
    part_max,  # float32 scratch [rows_total, TILES], if SCORE: maximum of the logits, and the sum of exp(logit - it)
    part_sum,
    known_logit,  # float32 scratch [rows_total], if SCORE
    nats,  # float32 scratch [n, BLOCK_W], if SCORE
    chosen,  # int32 scratch [n, 2 * BLOCK_W]: tokens of the window, then of the positions behind it
    broken,  # int32 [n, BLOCK_W], zero before and after: rows whose logits are not finite
    arrivals,  # int32 [n_blocks], zero before and after
    n,
    n_positions,
    epsilon,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    V: tl.constexpr,  # TOKENS, padded
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,  # W, padded
    CANVASES: tl.constexpr,  # of a block
    BLOCK_R: tl.constexpr,  # rows of a block: max(16, CANVASES * BLOCK_W)
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,  # V / BLOCK_C tiles, this many at once, padded
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GUIDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    SCORE: tl.constexpr,
    ADVANCE: tl.constexpr,  # False: leave the tokens in `chosen` and change nothing else
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    block, tile = tl.program_id(0), tl.program_id(1)
    token = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    real = (token < TOKENS)[None, :]
    w_first, g_first, shift = 0.0, 0.0, 0.0
    if EARLY:
        w_first = load_weights(weight, token, token < TOKENS, 0, INNER, FIRST)
    if OVERLAP:
        if INNER > SLICES * FIRST:
            mine = (token < TOKENS) & (block == 0)
            prefetch_weights(weight, token, mine, FIRST if EARLY else 0, INNER, INNER // SLICES)
    if EARLY and NORM:
        g_first = load_gain(gain, 0, INNER, FIRST)
    if BIAS:
        shift = tl.load(bias + token, mask=token < TOKENS, other=0.0).to(tl.float32)
    begin(OVERLAP)
    rows_total = tl.num_programs(0).to(tl.int64) * BLOCK_R
    TILES: tl.constexpr = V // BLOCK_C
    b, j, ok = rows_of(tl.arange(0, BLOCK_R), block, n, W, BLOCK_W, CANVASES)
    row = (block * BLOCK_R).to(tl.int64) + tl.arange(0, BLOCK_R)
    start = tl.load(position + b, mask=ok, other=0)

    logits = _logits(
        hidden, gain, weight, shift, b * W + j, ok, token, w_first, g_first, epsilon, INNER, TOKENS, BLOCK_K, STAGES,
        EARLY, NORM, BIAS,
    )  # fmt: skip
    if GUIDED:
        without = _logits(
            hidden, gain, weight, shift, (b + n) * W + j, ok, token, w_first, g_first, epsilon, INNER, TOKENS, BLOCK_K,
            STAGES, EARLY, NORM, BIAS,
        )  # fmt: skip
        mixed = without + tl.load(scale + b)[:, None] * (logits - without)
        logits = tl.where((tl.load(guided + b) != 0)[:, None], mixed, logits)
    finite = tl.abs(logits) < float("inf")
    spoilt = tl.min((finite | ~real).to(tl.int32), axis=1) == 0
    tl.store(broken + b * BLOCK_W + j, 1, mask=ok & (start < tl.load(end + b)) & spoilt)
    logits = tl.where(finite, logits, 0.0)  # whatever is drawn is then a token
    if SCORE:
        masked = tl.where(real, logits, float("-inf"))
        top = tl.max(masked, axis=1)
        above = tl.where(top == float("-inf"), 0.0, top)  # a tile may be all padding
        tl.store(part_max + row * TILES + tile, top)
        tl.store(part_sum + row * TILES + tile, tl.sum(tl.exp(masked - above[:, None]), axis=1))
        known = tl.load(canvas + b * n_positions + start + j, mask=ok & (start + j < n_positions), other=-1)
        own = tl.sum(tl.where(token[None, :] == known[:, None], logits, 0.0), axis=1)
        tl.store(known_logit + row, own, mask=(known >= tile * BLOCK_C) & (known < (tile + 1) * BLOCK_C))

    # This program's tokens: scores / temperature, and the noise of the window's positions and of those behind it.
    degree = tl.load(temperature + b)
    random = (degree > 0)[:, None]
    score = tl.div_rn(logits, tl.where(random, degree[:, None], 1.0) + tl.zeros_like(logits))
    score = tl.where(real, score, float("-inf"))
    low, high, number = tl.load(seed_low + b), tl.load(seed_high + b), tl.load(index + b)
    own_noise = tl.where(random, gumbel(low, high, number, start + j, tile * BLOCK_C, BLOCK_C), 0.0)
    FILTERED: tl.constexpr = TOP_K or TOP_P
    if FILTERED:
        place = row[:, None] * V + token[None, :]
        tl.store(scores + place, score)
        tl.store(noise + place, own_noise)
    else:
        _best_of_tile(score + own_noise, tile, row, rows_total, part_score, part_token, TILES, 0, BLOCK_C)
    if W > 1:
        ahead = tl.where(random, gumbel(low, high, number, start + W + j, tile * BLOCK_C, BLOCK_C), 0.0)
        if FILTERED:
            tl.store(noise + rows_total * V + row[:, None] * V + token[None, :], ahead)
        else:
            windows = tl.reshape(score, [BLOCK_R // BLOCK_W, BLOCK_W, BLOCK_C])
            last = (tl.arange(0, BLOCK_W) == W - 1)[None, :, None]
            last_score = tl.max(tl.where(last, windows, float("-inf")), axis=1)[:, None, :]
            of_last = tl.reshape(
                tl.broadcast_to(last_score, [BLOCK_R // BLOCK_W, BLOCK_W, BLOCK_C]), [BLOCK_R, BLOCK_C]
            )
            _best_of_tile(of_last + ahead, tile, row, rows_total, part_score, part_token, TILES, 1, BLOCK_C)

    if not FILTERED:  # else `choose_rows` does the rest
        tl.debug_barrier()  # every warp's stores before the one atomic that publishes them
        arrived = tl.atomic_add(arrivals + block, 1, sem="acq_rel")
        if arrived == tl.num_programs(1) - 1:
            tl.store(arrivals + block, 0)
            drawn = _best_of_row(row, part_score, part_token, TILES, BLOCK_T)
            choose(b, j, ok, drawn, n_positions, canvas, position, chosen, BLOCK_W)
            if W > 1:
                guess = _best_of_row(rows_total + row, part_score, part_token, TILES, BLOCK_T)
                choose(b, j + W, ok, guess, n_positions, canvas, position, chosen, BLOCK_W)
            finish(
                block, n, n_positions, x, wte, wpe, canvas, pass_starts, position, end, inputs, slots, offset, guided,
                scored, log_likelihood, failed, part_max, part_sum, known_logit, nats, chosen, broken,
                WIDTH, W, BLOCK_W, CANVASES, BLOCK_R, BLOCK_E, TILES, BLOCK_T, GUIDED, SCORE, ADVANCE,
            )  # fmt: skip


@dataclass(frozen=True)
class Scratch:
    """Memory of launches for one number of canvases, one window and one set of steps; None where it is not needed."""

    hidden: torch.Tensor | None
    scores: torch.Tensor | None
    noise: torch.Tensor | None
    part_score: torch.Tensor | None
    part_token: torch.Tensor | None
    part_max: torch.Tensor | None
    part_sum: torch.Tensor | None
    known_logit: torch.Tensor | None
    nats: torch.Tensor | None
    chosen: torch.Tensor
    broken: torch.Tensor
    arrivals: torch.Tensor


def _blocks(n: int, window: int) -> tuple[int, int, int, int]:
    # padded window, canvases of a block, rows of a block, number of blocks
    block_w = triton.next_power_of_2(window)
    canvases = max(1, min(triton.next_power_of_2(n), 16 // block_w))
    return block_w, canvases, max(16, canvases * block_w), triton.cdiv(n, canvases)


def _settings(configs: Table, rows: int, head: Head) -> dict[str, int]:
    n_tokens, width = head.weight.shape
    return settings(configs, "sample_head", rows, head.weight.dtype, k=width, n=n_tokens)


def _vocabulary(n_tokens: int, config: dict[str, int]) -> tuple[int, int]:
    # padded vocabulary, tokens of a program
    block = min(max(512, config["block_c"]), max(16, triton.next_power_of_2(n_tokens)))
    return triton.cdiv(n_tokens, block) * block, min(config["block_c"], block)


def make_scratch(n: int, window: int, head: Head, steps: Steps, configs: Table) -> Scratch:
    n_tokens, device = len(head.weight), head.weight.device
    block_w, _, rows, blocks = _blocks(n, window)
    padded, block_c = _vocabulary(n_tokens, _settings(configs, n * window, head))
    total, tiles = rows * blocks, padded // block_c

    def memory(needed: bool, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        return torch.empty(shape, dtype=dtype, device=device) if needed else None

    rows_of_head = n * window * (2 if steps.guided else 1)
    inner = 0 if head.inner_weight is None else len(head.inner_weight)
    filtered, ahead = steps.top_k or steps.top_p, 2 if window > 1 else 1
    return Scratch(
        hidden=memory(inner > 0, rows_of_head, inner, dtype=head.weight.dtype),
        scores=memory(filtered, total, padded),
        noise=memory(filtered, ahead, total, padded),
        part_score=memory(not filtered, ahead, total, tiles),
        part_token=memory(not filtered, ahead, total, tiles, dtype=torch.int32),
        part_max=memory(steps.score, total, tiles),
        part_sum=memory(steps.score, total, tiles),
        known_logit=memory(steps.score, total),
        nats=memory(steps.score, n, block_w),
        chosen=torch.empty((n, 2 * block_w), dtype=torch.int32, device=device),
        broken=torch.zeros((n, block_w), dtype=torch.int32, device=device),
        arrivals=torch.zeros(blocks, dtype=torch.int32, device=device),
    )


def hidden_layer(
    x: torch.Tensor, head: Head, out: torch.Tensor, configs: Table, *, exact: bool = False
) -> torch.Tensor:
    """x float32 [rows, width] → out [rows, inner]: final norm and the hidden layer of a head that has one. exact: see
    `norm_linear`."""
    assert head.inner_weight is not None
    return norm_linear(
        x, head.inner_weight, out, configs=configs, gain=head.gain, bias=head.inner_bias, epsilon=head.epsilon,
        activation="gelu", exact=exact,
    )  # fmt: skip


def sample_head(
    x: torch.Tensor,
    inputs: torch.Tensor,
    head: Head,
    canvases: Canvases,
    scratch: Scratch,
    steps: Steps,
    *,
    configs: Table,
    advance: bool = True,
) -> None:
    """One pass's end: x float32 [lanes · W, width] and inputs int32 [n, W] of this window become those of the next, and
    the canvases move on. lanes: n, or 2 n if steps.guided. A step that some canvas needs must be among `steps`; a
    canvas that does not need it is drawn as if it were not.

    advance=False only draws, into scratch.chosen[:, :W].
    """
    n, window = inputs.shape
    n_tokens, inner = head.weight.shape
    width = len(head.gain)
    n_positions = canvases.canvas.shape[1]
    lanes = n * (2 if steps.guided else 1)
    expect(
        x.shape == (lanes * window, width) and x.dtype == torch.float32, f"x must be float32 {(lanes * window, width)}"
    )
    expect(inputs.dtype == torch.int32, "inputs must be int32")
    expect(len(canvases.canvas) == n, f"there must be {n} canvases")
    drawings = canvases.drawings
    expect_contiguous(
        x=x, inputs=inputs, gain=head.gain, weight=head.weight, bias=head.bias, wte=head.wte, wpe=head.wpe,
        **vars(drawings), **canvases.tensors(),
    )  # fmt: skip
    block_w, per_block, rows, blocks = _blocks(n, window)
    config = _settings(configs, n * window, head)
    padded, block_c = _vocabulary(n_tokens, config)
    c, s = canvases, scratch
    shared = {
        "WIDTH": width, "TOKENS": n_tokens, "V": padded, "W": window, "BLOCK_W": block_w, "CANVASES": per_block,
        "BLOCK_R": rows, "BLOCK_E": min(256, triton.next_power_of_2(width)),
        "BLOCK_T": min(32, triton.next_power_of_2(padded // block_c)), "GUIDED": steps.guided, "TOP_K": steps.top_k,
        "TOP_P": steps.top_p, "SCORE": steps.score, "ADVANCE": advance, **overlap(configs),
    }  # fmt: skip
    hidden = x
    if s.hidden is not None:
        hidden = hidden_layer(x, head, s.hidden, configs, exact=True)
    _sample_head[(blocks, padded // block_c)](
        x, hidden, head.gain, head.weight, x if head.bias is None else head.bias, head.wte, head.wpe, c.canvas,
        c.pass_starts, c.position, c.end, inputs, c.slots, c.offset, c.index, drawings.seed_low, drawings.seed_high,
        drawings.temperature, drawings.guidance_scale, c.guided, c.scored,
        c.log_likelihood, c.failed, s.scores, s.noise, s.part_score, s.part_token, s.part_max, s.part_sum,
        s.known_logit, s.nats, s.chosen, s.broken, s.arrivals, n, n_positions, head.epsilon, INNER=inner,
        NORM=hidden is x, BIAS=head.bias is not None, BLOCK_C=block_c, BLOCK_K=config["block_k"],
        STAGES=config["stages"], EARLY=config["early"], num_warps=config["warps"], **shared,
    )  # fmt: skip
    if steps.top_k or steps.top_p:
        block_v, chunk = min(config["block_v"], triton.next_power_of_2(padded)), config["chunk"]
        choose_rows[(blocks, rows // chunk)](
            x, head.wte, head.wpe, c.canvas, c.pass_starts, c.position, c.end, inputs, c.slots, c.offset,
            drawings.top_k, drawings.top_p, c.guided, c.scored, c.log_likelihood, c.failed, s.scores, s.noise,
            s.part_max, s.part_sum, s.known_logit, s.nats, s.chosen, s.broken, s.arrivals, n, n_positions,
            TILES=padded // block_c, BLOCK_V=block_v, CHUNK=chunk, num_warps=filter_warps(block_v), **shared,
        )  # fmt: skip
