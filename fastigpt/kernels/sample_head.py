"""From the hidden states of a window to decided tokens and the next window's inputs, in one launch.

Final norm, head, guidance, temperature, top-k, top-p, noise, argmax, known tokens, which guesses were right, and the
embeddings of the next inputs. The colours are split over TILES programs for each block of images: each scores its
colours and computes their noise (the bulk of the work); the last to finish chooses the tokens. Position, tokens and
noise counters live on the device, so a captured graph can be replayed without the host.

The window of image b scores pixels position[b] … position[b] + W − 1. Its inputs are the token before and W − 1
guesses. The draw at a pixel depends only on the tokens before it, so it stands if all guesses before it were equal to
their draws: that many tokens are kept, and the next window starts behind them. Its guesses are the draws that were
not kept, then draws from the last row's logits with the noise of the pixel they are for (fixed-point sampling;
Wiggers and Hoogeboom 2020, arXiv 2002.09928). W = 1 is plain decoding.

The draw follows the noise contract of fastigpt/sampling.py bit for bit, and needs no sort: thresholds of top-k and
top-p are found by bisection over the bit patterns of the scores, ties included. `sample_head_reference` is the plain
twin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastigpt.kernels.launch import Table, expect, expect_contiguous, settings
from fastigpt.kernels.overlap import begin, overlap
from fastigpt.sampling import Drawing, draw, filter_logits, guide, gumbel_noise


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    # Philox4x32-10; uint32 counters [R, Q] and keys.
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _gumbel(seed, index, position, first_color, BLOCK_C: tl.constexpr):
    # seed: int64 scalar; index int64 [R], position int32 [R] → float32 [R, BLOCK_C] for colours first_color …
    zero = tl.zeros([index.shape[0], BLOCK_C // 4], tl.uint32)
    c0 = zero + (first_color // 4 + tl.arange(0, BLOCK_C // 4)).to(tl.uint32)[None, :]
    c1 = zero + position.to(tl.uint32)[:, None]
    c2 = zero + index.to(tl.uint32)[:, None]
    c3 = zero + (index >> 32).to(tl.uint32)[:, None]
    k0 = zero + seed.to(tl.uint32)
    k1 = zero + (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = _philox(c0, c1, c2, c3, k0, k1)
    bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    uniform = ((bits >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-08  # 2^-24
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _ordered(x):
    # float32 → int32 with the same order.
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _top_k(scores, k):
    # scores [R, CP]: −inf below the k-th largest of each row; those as good as it stay.
    keys = _ordered(scores)
    low = tl.full([scores.shape[0]], -0x80000000, tl.int64)  # at least k keys are >= low
    high = tl.full([scores.shape[0]], 0x80000000, tl.int64)  # fewer are >= high
    for _ in range(32):
        middle = (low + high) >> 1
        enough = tl.sum((keys >= middle.to(tl.int32)[:, None]).to(tl.int32), axis=1) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return tl.where(keys >= low.to(tl.int32)[:, None], scores, float("-inf"))


@triton.jit
def _top_p(scores, rest):
    # Removes the least likely while their probabilities sum to at most rest = 1 − top_p: in rising order of score, of
    # equal scores the lowest token first; never the last.
    keys = _ordered(scores)
    c = tl.arange(0, scores.shape[1])
    top = tl.max(scores, axis=1)
    p = tl.exp(scores - top[:, None])
    p = (p / tl.sum(p, axis=1)[:, None]).to(tl.float64)
    low = tl.full([scores.shape[0]], -0x80000000, tl.int64)  # what is below low sums to at most rest
    high = tl.full([scores.shape[0]], 0x80000000, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        below = tl.sum(tl.where(keys < middle.to(tl.int32)[:, None], p, 0.0), axis=1).to(tl.float32)
        fits = below <= rest
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    threshold = low.to(tl.int32)[:, None]
    below = tl.sum(tl.where(keys < threshold, p, 0.0), axis=1)
    tied = keys == threshold
    each = tl.max(tl.where(tied, p, 0.0), axis=1)
    rank = tl.cumsum(tied.to(tl.int32), axis=1)
    so_far = (below[:, None] + rank.to(tl.float64) * each[:, None]).to(tl.float32)
    last = tl.max(tl.where(scores == top[:, None], c[None, :], -1), axis=1)
    removed = ((keys < threshold) | (tied & (so_far <= rest))) & (c[None, :] != last[:, None])
    return tl.where(removed, float("-inf"), scores)


@triton.jit
def _logits(
    x, gain, weight, row, ok, color, epsilon,
    WIDTH: tl.constexpr, COLORS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Final norm and head for BLOCK_R rows and BLOCK_C colours; the norm's factor is applied to the products.
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R], tl.float32)
    for k0 in range(0, WIDTH, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = k < WIDTH
        h = tl.load(x + row[:, None] * WIDTH + k[None, :], mask=ok[:, None] & inside[None, :], other=0.0)
        g = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(
            weight + color[:, None] * WIDTH + k[None, :], mask=(color < COLORS)[:, None] & inside[None, :], other=0.0
        )
        squares += tl.sum(h * h, axis=1)
        acc = tl.dot((h * g[None, :]).to(w.dtype), tl.trans(w), acc, input_precision="ieee")
    return acc * tl.rsqrt(squares / WIDTH + epsilon)[:, None]


@triton.jit
def _rows(r, block, n, W: tl.constexpr, BLOCK_W: tl.constexpr, IMAGES: tl.constexpr):
    # Rows r of a block → (image int64, place in the window, whether there is such a row).
    j = r % BLOCK_W
    image = block * IMAGES + r // BLOCK_W
    ok = (r < IMAGES * BLOCK_W) & (j < W) & (image < n)
    return tl.where(ok, image, 0).to(tl.int64), j, ok


@triton.jit
def _choose(
    r, scored, ahead, block, n, n_pixels, canvas, position, integers, numbers, scores, noise, chosen,
    CP: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, IMAGES: tl.constexpr, BLOCK_R: tl.constexpr,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    # A token for each of CHUNK rows r, from the scores of rows `scored`. ahead: 0 for the window's own pixels, else the
    # number of rows in all: for the pixels W further on, whose noise lies that far on in `noise`.
    image, j, ok = _rows(r, block, n, W, BLOCK_W, IMAGES)
    place = j + tl.where(ahead > 0, W, 0)
    c = tl.arange(0, CP)
    base = (block * BLOCK_R).to(tl.int64)
    at = (base + tl.where(ok, scored, 0))[:, None] * CP + c[None, :]
    s = tl.load(scores + at, cache_modifier=".cg")  # past the L1 cache: other programs have just written it
    if TOP_K:
        s = _top_k(s, tl.load(integers + 1))
    if TOP_P:
        s = _top_p(s, tl.load(numbers + 1))
    if W > 1 and (TOP_K or TOP_P):
        tl.store(scores + at, s, mask=ok[:, None])
    s += tl.load(noise + (base + ahead + r)[:, None] * CP + c[None, :], cache_modifier=".cg")
    token = tl.argmax(s, axis=1).to(tl.int32)
    pixel = tl.load(position + image, mask=ok, other=0) + place
    known = tl.load(canvas + image * n_pixels + pixel, mask=ok & (pixel < n_pixels), other=-1)
    tl.store(chosen + image * (2 * BLOCK_W) + place, tl.where(known >= 0, known, token), mask=ok)


@triton.jit
def _advance(
    block, n, n_pixels, canvas, pass_starts, position, inputs, slots, offset, chosen,
    W: tl.constexpr, BLOCK_W: tl.constexpr, IMAGES: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    # Keeps the draws up to and including the first that was guessed wrong, and moves the window behind them.
    i = block * IMAGES + tl.arange(0, IMAGES)
    live = i < n
    j = tl.arange(0, BLOCK_W)
    mine = live[:, None] & (j < W)[None, :]
    before = tl.load(position + i, mask=live, other=n_pixels)
    drawn = tl.load(chosen + i[:, None] * (2 * BLOCK_W) + j[None, :], mask=mine, other=0)
    guess = tl.load(inputs + i[:, None] * W + j[None, :] + 1, mask=mine & (j < W - 1)[None, :], other=-1)
    wrong = tl.where(drawn == guess, W - 1, tl.minimum(j, W - 1)[None, :] + tl.zeros_like(drawn))
    kept = tl.minimum(tl.min(wrong, axis=1) + 1, n_pixels - before)
    after = before + kept
    more = live & (after < n_pixels)
    place = i.to(tl.int64) * n_pixels + before
    tl.store(canvas + place[:, None] + j[None, :], drawn, mask=mine & (j[None, :] < kept[:, None]))
    tl.store(pass_starts + place, tl.full([IMAGES], 1, tl.int8), mask=live & (kept > 0))
    tl.store(position + i, after, mask=live)
    tl.store(slots + i, tl.where(more, after - tl.load(offset + i, mask=live, other=0), -1), mask=live)
    if GUIDED:
        without = tl.load(offset + n + i, mask=live, other=0)
        tl.store(slots + n + i, tl.where(more, after - without, -1), mask=live)
    again = mine & more[:, None]
    following = chosen + i[:, None] * (2 * BLOCK_W) + (kept - 1)[:, None] + j[None, :]
    tl.store(inputs + i[:, None] * W + j[None, :], tl.load(following, mask=again, other=0), mask=again)


@triton.jit
def _embed(
    block, n, n_pixels, x, wte, wpe, position, inputs,
    WIDTH: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr, IMAGES: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    # Token and position of every input; those past the last pixel take its position, and nobody reads what comes of
    # them.
    image, j, ok = _rows(tl.arange(0, BLOCK_R), block, n, W, BLOCK_W, IMAGES)
    start = tl.load(position + image, mask=ok, other=n_pixels)
    ok = ok & (start < n_pixels)
    pixel = tl.minimum(start + j, n_pixels - 1).to(tl.int64)
    token = tl.load(inputs + image * W + j, mask=ok, other=0).to(tl.int64)
    row = image * W + j
    for e0 in range(0, WIDTH, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        mask = ok[:, None] & (e < WIDTH)[None, :]
        what = tl.load(wte + token[:, None] * WIDTH + e[None, :], mask=mask, other=0.0).to(tl.float32)
        where = tl.load(wpe + pixel[:, None] * WIDTH + e[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(x + row[:, None] * WIDTH + e[None, :], what + where, mask=mask)
        if GUIDED:
            tl.store(x + (row + n * W)[:, None] * WIDTH + e[None, :], what + where, mask=mask)


@triton.jit
def _sample_head(
    x,  # float32 [lanes * W, WIDTH]; lanes = n, or 2 n if GUIDED: with the prompt, then without
    gain,  # [WIDTH]
    weight,  # [COLORS, WIDTH]
    wte,  # [COLORS + 1, WIDTH]
    wpe,  # [n_pixels, WIDTH]
    canvas,  # int32 [n, n_pixels], -1 = not decided yet
    pass_starts,  # int8 [n, n_pixels]
    position,  # int32 [n]: first pixel of the window; n_pixels = finished
    inputs,  # int32 [n, W]
    slots,  # int32 [lanes]: cache slot of the window's first input; -1 = finished
    offset,  # int32 [lanes]: slot = position - offset
    index,  # int64 [n]: image index of the noise contract
    integers,  # int64 [2]: seed, top_k
    numbers,  # float32 [3]: temperature, 1 - top_p, guidance scale
    scores,  # float32 scratch [n_blocks * BLOCK_R, CP]
    noise,  # float32 scratch [2, n_blocks * BLOCK_R, CP]
    chosen,  # int32 scratch [n, 2 * BLOCK_W]: draws of the window, then of the pixels behind it
    arrivals,  # int32 [n_blocks], zero before and after
    n,
    n_pixels,
    epsilon,
    WIDTH: tl.constexpr,
    COLORS: tl.constexpr,
    CP: tl.constexpr,  # COLORS, padded to a power of two
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,  # W, padded
    IMAGES: tl.constexpr,  # of a block
    BLOCK_R: tl.constexpr,  # rows of a block: max(16, IMAGES * BLOCK_W)
    CHUNK: tl.constexpr,  # rows whose tokens are chosen at once
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GUIDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    ADVANCE: tl.constexpr,  # False: leave the draws in `chosen` and change nothing else
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    block, tile = tl.program_id(0), tl.program_id(1)
    rows_total = tl.num_programs(0) * BLOCK_R
    image, j, ok = _rows(tl.arange(0, BLOCK_R), block, n, W, BLOCK_W, IMAGES)
    start = tl.load(position + image, mask=ok, other=0)
    temperature = tl.load(numbers)
    random = temperature > 0

    # This program's colours: scores / temperature, and the noise of the window's pixels and of those behind it.
    color = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    row = image * W + j
    logits = _logits(x, gain, weight, row, ok, color, epsilon, WIDTH, COLORS, BLOCK_R, BLOCK_C, BLOCK_K)
    if GUIDED:
        without = _logits(x, gain, weight, row + n * W, ok, color, epsilon, WIDTH, COLORS, BLOCK_R, BLOCK_C, BLOCK_K)
        logits = without + tl.load(numbers + 2) * (logits - without)
    logits = tl.div_rn(logits, tl.where(random, temperature, 1.0) + tl.zeros_like(logits))
    at = (block * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None] * CP + color[None, :]
    tl.store(scores + at, tl.where((color < COLORS)[None, :], logits, float("-inf")))
    seed = tl.load(integers)
    number = tl.load(index + image, mask=ok, other=0)
    tl.store(noise + at, tl.where(random, _gumbel(seed, number, start + j, tile * BLOCK_C, BLOCK_C), 0.0))
    if W > 1:
        ahead = _gumbel(seed, number, start + W + j, tile * BLOCK_C, BLOCK_C)
        tl.store(noise + rows_total * CP + at, tl.where(random, ahead, 0.0))

    tl.debug_barrier()  # every warp's stores before the one atomic that publishes them
    arrived = tl.atomic_add(arrivals + block, 1, sem="acq_rel")
    if arrived == tl.num_programs(1) - 1:
        tl.store(arrivals + block, 0)
        for r0 in range(0, BLOCK_R, CHUNK):
            r = r0 + tl.arange(0, CHUNK)
            _choose(
                r, r, 0, block, n, n_pixels, canvas, position, integers, numbers, scores, noise, chosen,
                CP, W, BLOCK_W, IMAGES, BLOCK_R, TOP_K, TOP_P,
            )  # fmt: skip
        if W > 1:
            tl.debug_barrier()
            for r0 in range(0, BLOCK_R, CHUNK):  # guesses behind the window, from the logits of its last row
                r = r0 + tl.arange(0, CHUNK)
                last = r - r % BLOCK_W + W - 1
                _choose(
                    r, last, rows_total, block, n, n_pixels, canvas, position, integers, numbers, scores, noise, chosen,
                    CP, W, BLOCK_W, IMAGES, BLOCK_R, False, False,
                )  # fmt: skip
        if ADVANCE:
            tl.debug_barrier()
            _advance(
                block, n, n_pixels, canvas, pass_starts, position, inputs, slots, offset, chosen,
                W, BLOCK_W, IMAGES, GUIDED,
            )  # fmt: skip
            tl.debug_barrier()
            _embed(
                block, n, n_pixels, x, wte, wpe, position, inputs,
                WIDTH, W, BLOCK_W, IMAGES, BLOCK_R, BLOCK_E, GUIDED,
            )  # fmt: skip


@dataclass(frozen=True)
class Head:
    """What the head needs of a model: gain [width], weight [colours, width], wte [colours + 1, width], wpe [pixels,
    width].
    """

    gain: torch.Tensor
    weight: torch.Tensor
    wte: torch.Tensor
    wpe: torch.Tensor
    epsilon: float


@dataclass(frozen=True)
class State:
    """How far the images of a job have come; see the arguments of `_sample_head` for shapes. All on the device."""

    canvas: torch.Tensor
    pass_starts: torch.Tensor
    position: torch.Tensor
    slots: torch.Tensor
    offset: torch.Tensor
    index: torch.Tensor
    integers: torch.Tensor
    numbers: torch.Tensor


@dataclass(frozen=True)
class Scratch:
    """Memory of launches for one number of images and one window."""

    scores: torch.Tensor
    noise: torch.Tensor
    chosen: torch.Tensor
    arrivals: torch.Tensor


def set_drawing(integers: torch.Tensor, numbers: torch.Tensor, drawing: Drawing, n_colors: int) -> None:
    """Fills State.integers and State.numbers for a drawing."""
    seed = drawing.seed - 2**64 if drawing.seed >= 2**63 else drawing.seed
    top_k = n_colors if drawing.top_k is None else min(drawing.top_k, n_colors)
    rest = 1.0 - (1.0 if drawing.top_p is None else drawing.top_p)
    # Filled, not copied: that waits for nothing and may be captured.
    for state, values in (
        (integers, (seed, top_k)),
        (numbers, (drawing.temperature, rest, drawing.guidance_scale or 0.0)),
    ):
        for i, value in enumerate(values):
            state[i].fill_(value)


def _blocks(n: int, window: int) -> tuple[int, int, int, int]:
    # padded window, images of a block, rows of a block, number of blocks
    block_w = triton.next_power_of_2(window)
    images = max(1, min(triton.next_power_of_2(n), 16 // block_w))
    return block_w, images, max(16, images * block_w), triton.cdiv(n, images)


def make_scratch(n: int, window: int, n_colors: int, device: torch.device) -> Scratch:
    block_w, _, rows, blocks = _blocks(n, window)
    colors = max(16, triton.next_power_of_2(n_colors))
    return Scratch(
        torch.empty((blocks * rows, colors), dtype=torch.float32, device=device),
        torch.empty((2, blocks * rows, colors), dtype=torch.float32, device=device),
        torch.empty((n, 2 * block_w), dtype=torch.int32, device=device),
        torch.zeros(blocks, dtype=torch.int32, device=device),
    )


def sample_head(
    x: torch.Tensor,
    inputs: torch.Tensor,
    head: Head,
    state: State,
    scratch: Scratch,
    drawing: Drawing,
    *,
    configs: Table,
    advance: bool = True,
) -> None:
    """One pass's end: x float32 [lanes · W, width] and inputs int32 [n, W] of this window become those of the next, and
    state moves on. Of `drawing` only which steps there are is read: the values are in state, so a graph serves them
    all.

    advance=False only draws, into scratch.chosen[:, :W].
    """
    n, window = inputs.shape
    n_colors, width = head.weight.shape
    n_pixels = state.canvas.shape[1]
    guided = drawing.guidance_scale is not None
    lanes = n * (2 if guided else 1)
    expect(
        x.shape == (lanes * window, width) and x.dtype == torch.float32, f"x must be float32 {(lanes * window, width)}"
    )
    expect(inputs.dtype == torch.int32, "inputs must be int32")
    expect(state.slots.shape == state.offset.shape == (lanes,), f"slots and offset must be [{lanes}]")
    expect(state.index.shape == state.position.shape == (n,), f"index and position must be [{n}]")
    expect_contiguous(x=x, inputs=inputs, gain=head.gain, weight=head.weight, wte=head.wte, wpe=head.wpe, **vars(state))
    block_w, images, rows, blocks = _blocks(n, window)
    colors = scratch.scores.shape[1]
    config = settings(configs, "sample_head", n * window)
    top_k = drawing.top_k is not None and drawing.top_k < n_colors
    top_p = drawing.top_p is not None and drawing.top_p < 1.0
    block_c = min(config["block_c"], colors)
    _sample_head[(blocks, colors // block_c)](
        x, head.gain, head.weight, head.wte, head.wpe, state.canvas, state.pass_starts, state.position, inputs,
        state.slots, state.offset, state.index, state.integers, state.numbers,
        scratch.scores, scratch.noise, scratch.chosen, scratch.arrivals, n, n_pixels, head.epsilon,
        WIDTH=width, COLORS=n_colors, CP=colors, W=window, BLOCK_W=block_w, IMAGES=images, BLOCK_R=rows,
        CHUNK=8 if top_p else 16,  # float64 sums of top-p take twice the registers
        BLOCK_C=block_c, BLOCK_K=min(config["block_k"], max(16, triton.next_power_of_2(width))),
        BLOCK_E=min(256, triton.next_power_of_2(width)), GUIDED=guided,
        TOP_K=top_k, TOP_P=top_p, ADVANCE=advance, num_warps=config["warps"], **overlap(configs),
    )  # fmt: skip


def head_logits_reference(x: torch.Tensor, head: Head) -> torch.Tensor:
    """float32 [rows, colours]: final norm and head."""
    x = x.float()
    x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + head.epsilon) * head.gain.float()
    return x @ head.weight.float().T


def sample_head_reference(x: torch.Tensor, inputs: torch.Tensor, head: Head, state: State, drawing: Drawing) -> None:
    """The same in plain PyTorch, image by image."""
    n, window = inputs.shape
    n_pixels = state.canvas.shape[1]
    logits = head_logits_reference(x, head).view(-1, n, window, head.weight.shape[0])
    mixed = logits[0] if drawing.guidance_scale is None else guide(logits[0], logits[1], drawing.guidance_scale)
    for b in range(n):
        start = int(state.position[b])
        if start >= n_pixels:
            continue
        pixels = start + torch.arange(2 * window - 1, device=x.device)
        drawn = draw(mixed[b], state.index[b], pixels[:window], drawing)
        behind = filter_logits(mixed[b, -1:], drawing)
        if drawing.temperature > 0:
            behind = behind + gumbel_noise(drawing.seed, state.index[b], pixels[window:], logits.shape[-1])
        follow = torch.cat([drawn, behind.argmax(-1).expand(window - 1)])
        inside = pixels < n_pixels
        known = torch.where(inside, state.canvas[b, pixels.clamp(max=n_pixels - 1)].long(), -1)
        follow = torch.where(known >= 0, known, follow)
        right = (follow[: window - 1] == inputs[b, 1:]).long().cumprod(0)
        kept = min(1 + int(right.sum()), n_pixels - start)
        state.canvas[b, start : start + kept] = follow[:kept].int()
        state.pass_starts[b, start] = 1
        after = start + kept
        state.position[b] = after
        for lane in range(b, len(state.slots), n):
            state.slots[lane] = after - state.offset[lane] if after < n_pixels else -1
        if after < n_pixels:
            inputs[b] = follow[kept - 1 : kept - 1 + window].int()
            at = (after + torch.arange(window, device=x.device)).clamp(max=n_pixels - 1)
            x.view(-1, n, window, x.shape[-1])[:, b] = head.wte[inputs[b].long()].float() + head.wpe[at].float()
