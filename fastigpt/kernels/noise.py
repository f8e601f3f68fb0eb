"""The noise contract of fastigpt/sampling.py on a GPU, bit for bit: Philox4x32-10 and Gumbel noise.

`fastigpt.sampling.gumbel_noise` is the plain twin.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    # Philox4x32-10; uint32 counters and keys [R, Q].
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
def gumbel(seed_low, seed_high, index, position, first_token, BLOCK_C: tl.constexpr):
    # seed_low, seed_high, index: int64 [R]; position: int32 [R] → float32 [R, BLOCK_C] for tokens first_token …
    zero = tl.zeros([index.shape[0], BLOCK_C // 4], tl.uint32)
    c0 = zero + (first_token // 4 + tl.arange(0, BLOCK_C // 4)).to(tl.uint32)[None, :]
    c1 = zero + position.to(tl.uint32)[:, None]
    c2 = zero + index.to(tl.uint32)[:, None]
    c3 = zero + (index >> 32).to(tl.uint32)[:, None]
    k0 = zero + seed_low.to(tl.uint32)[:, None]
    k1 = zero + seed_high.to(tl.uint32)[:, None]
    w0, w1, w2, w3 = _philox(c0, c1, c2, c3, k0, k1)
    bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    uniform = ((bits >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-08  # 2^-24
    return (-tl.log(-tl.log(uniform))).to(tl.float32)
