// Exponential, logarithm and the exact GELU of sixteen floats.
#pragma once
#include "simd/vectors.h"

namespace fastigpt {
namespace FASTIGPT_ISA {
namespace {

// e^x to about 1 ulp for x ≤ 88; 0 below −87. Cephes' polynomial (S. Moshier) after reduction by multiples of ln 2.
inline F16 exp16(F16 x) {
  const F16 lowest = set1(-87.0f);
  const F16 y = min(max(x, lowest), set1(88.0f));
  const I16 n = nearest(mul(y, set1(1.44269504088896341f)));
  const F16 k = to_float(n);
  F16 r = fma(k, set1(-0.693359375f), y);
  r = fma(k, set1(2.12194440e-4f), r);
  F16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  const F16 power = as_float(shift_left<23>(addi(n, set1i(127))));
  return select_less(x, lowest, zero(), mul(p, power));
}

// x · sigmoid(slope · x)
inline F16 gated(F16 x, float slope) { return div(x, add(set1(1.0f), exp16(mul(x, set1(-slope))))); }

// x · Φ(x) = x/2 · erfc(−x/√2), relative error of some 2e-7 near 0 and 1e-5 where it underflows. The polynomial of erfc
// is that of Press et al., "Numerical Recipes in C", 2nd edition, section 6.2.
inline F16 gelu16(F16 x) {
  const F16 z = mul(abs(x), set1(0.70710678118654752f)), one = set1(1.0f);
  const F16 t = div(one, fma(z, set1(0.5f), one));
  F16 p = set1(0.17087277f);
  p = fma(p, t, set1(-0.82215223f));
  p = fma(p, t, set1(1.48851587f));
  p = fma(p, t, set1(-1.13520398f));
  p = fma(p, t, set1(0.27886807f));
  p = fma(p, t, set1(-0.18628806f));
  p = fma(p, t, set1(0.09678418f));
  p = fma(p, t, set1(0.37409196f));
  p = fma(p, t, set1(1.00002368f));
  p = fma(p, t, set1(-1.26551223f));
  const F16 tail = mul(mul(x, set1(0.5f)), mul(t, exp16(sub(p, mul(z, z)))));  // of |x|, with the sign of x
  return select_less(x, zero(), tail, sub(x, tail));
}

// ln(1 + f) for f in [√½ − 1, √2 − 1], relative error of a few 2⁻²⁴ even near 0 (Cephes).
inline F16 log1p_reduced(F16 f) {
  const F16 z = mul(f, f);
  F16 p = set1(7.0376836292e-2f);
  p = fma(p, f, set1(-1.1514610310e-1f));
  p = fma(p, f, set1(1.1676998740e-1f));
  p = fma(p, f, set1(-1.2420140846e-1f));
  p = fma(p, f, set1(1.4249322787e-1f));
  p = fma(p, f, set1(-1.6668057665e-1f));
  p = fma(p, f, set1(2.0000714765e-1f));
  p = fma(p, f, set1(-2.4999993993e-1f));
  p = fma(p, f, set1(3.3333331174e-1f));
  return add(f, fma(mul(p, f), z, mul(z, set1(-0.5f))));
}

constexpr float kLn2 = 0.693147180559945309f;

// ln x for normal positive x.
inline F16 log16(F16 x) {
  const I16 bits = as_int(x);
  const I16 e = subi(shift_right<23>(bits), set1i(127));
  const F16 m = as_float(addi(andi(bits, set1i(0x007fffff)), set1i(0x3f800000)));  // [1, 2)
  const F16 root2 = set1(1.41421356f);
  const F16 f = select_less(m, root2, sub(m, set1(1.0f)), sub(mul(m, set1(0.5f)), set1(1.0f)));
  const F16 k = add(to_float(e), select_less(m, root2, zero(), set1(1.0f)));
  return fma(k, set1(kLn2), log1p_reduced(f));
}

}  // namespace
}  // namespace FASTIGPT_ISA
}  // namespace fastigpt
