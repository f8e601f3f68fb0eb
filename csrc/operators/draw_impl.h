// The draw: argmax of scores plus Gumbel noise, exactly as the noise contract says, written once for all instruction
// sets.
//
// The contract's noise is float64 arithmetic rounded to float32. Here every token first gets float32 noise whose error
// is bounded (kNoiseError, checked over all 2²⁴ inputs by the tests); only the tokens that could still win are then
// evaluated as the contract says, usually one.
#pragma once
#include <cmath>

#include "operators/kernels.h"
#include "simd/functions.h"
#include "simd/integers.h"

namespace fastigpt {
namespace FASTIGPT_ISA {
namespace {

constexpr float kNoiseError = 4e-6f;

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) for sixteen consecutive counters.
// out[4 · counter + word].
void philox_16(uint32_t first, const DrawKey& key, uint32_t* out) {
  alignas(64) static constexpr int32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  I16 c0 = addi(set1i(int32_t(first)), load(static_cast<const void*>(kLanes))), c1 = set1i(int32_t(key.position));
  I16 c2 = set1i(int32_t(uint32_t(key.index))), c3 = set1i(int32_t(uint32_t(key.index >> 32)));
  uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Product p0 = multiply(c0, 0xD2511F53u), p1 = multiply(c2, 0xCD9E8D57u);
    c0 = xori(xori(p1.high, c1), set1i(int32_t(k0)));
    c1 = p1.low;
    c2 = xori(xori(p0.high, c3), set1i(int32_t(k1)));
    c3 = p0.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  interleave(c0, c1, c2, c3, out);
}

// −log(−log u), u = (bits >> 8 + ½) · 2⁻²⁴ = z · 2⁻²⁵ with z odd. u near 1 is not a float32: there the reduced argument
// of the logarithm is made from z directly, without rounding.
inline F16 gumbel_16(I16 bits) {
  const I16 z = addi(shift_left<1>(shift_right<8>(bits)), set1i(1));
  const I16 half = set1i(1 << 24);
  // u < ½
  const I16 x = as_int(mul(to_float(z), set1(0x1p-25f)));
  const F16 m = as_float(addi(andi(x, set1i(0x007fffff)), set1i(0x3f800000)));
  const F16 root2 = set1(1.41421356f), one = set1(1.0f);
  const F16 f_small = select_less(m, root2, sub(m, one), sub(mul(m, set1(0.5f)), one));
  const F16 k_small = add(to_float(subi(shift_right<23>(x), set1i(127))), select_less(m, root2, zero(), one));
  // u > ½
  const F16 below_one = mul(to_float(subi(z, set1i(1 << 25))), set1(0x1p-25f));  // u − 1
  const F16 above_half = mul(to_float(subi(z, half)), set1(0x1p-24f));           // 2u − 1
  const F16 root_half = set1(-0.29289322f);
  const F16 f_large = select_less(below_one, root_half, above_half, below_one);
  const F16 k_large = select_less(below_one, root_half, set1(-1.0f), zero());
  const F16 f = select_less_if(z, half, f_small, f_large);
  const F16 k = select_less_if(z, half, k_small, k_large);
  const F16 log_u = fma(k, set1(kLn2), log1p_reduced(f));
  return sub(zero(), log16(sub(zero(), log_u)));
}

void gumbel(const uint32_t* bits, float* out, int n) {
  for (int i = 0; i < n; i += 16) store(out + i, gumbel_16(load(static_cast<const void*>(bits + i))));
}

inline float exact_score(float score, uint32_t bits) {
  const double u = (double(bits >> 8) + 0.5) * 0x1p-24;
  return score + float(-::log(-::log(u)));
}

int draw(const float* scores, int n, const DrawKey& key) {
  constexpr int kChunk = 1024;  // tokens whose noise is held at once
  uint32_t bits[kChunk];
  float noisy[kChunk];
  int best = -1;
  float best_score = 0;
  for (int base = 0; base < n; base += kChunk) {
    const int count = n - base < kChunk ? n - base : kChunk;
    F16 most = set1(-__builtin_inff());
    for (int i = 0; i < count; i += 64) {
      philox_16(uint32_t(base + i) / 4, key, bits + i);
      for (int j = i; j < i + 64; j += 16) {
        const F16 s = add(load(scores + base + j), gumbel_16(load(static_cast<const void*>(bits + j))));
        most = max(s, most);
        store(noisy + j, s);
      }
    }
    const float top = reduce_max(most);
    if (!(top > -__builtin_inff())) continue;
    // Both noises and both sums are off by at most kNoiseError and an ulp.
    const F16 limit = set1(top - (4 * kNoiseError + 0x1p-20f * __builtin_fabsf(top)));
    for (int i = 0; i < count; i += 16) {
      for (uint32_t mask = mask_less_equal(limit, load(noisy + i)); mask; mask &= mask - 1) {
        const int token = i + __builtin_ctz(mask);
        if (token >= count) break;
        const float s = exact_score(scores[base + token], bits[token]);
        if (best < 0 || s > best_score) best = base + token, best_score = s;
      }
    }
  }
  return best;
}

}  // namespace
}  // namespace FASTIGPT_ISA
}  // namespace fastigpt
