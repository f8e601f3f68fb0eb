// What random numbers need of sixteen integers: exclusive or, 32 × 32 bit products, words in the order of their lanes.
#pragma once
#include "simd/vectors.h"

namespace fastigpt {
namespace FASTIGPT_ISA {
namespace {

struct Product { I16 high, low; };

// 32 × 32 bit products, unsigned.
#if defined(__AVX512F__)
inline I16 xori(I16 a, I16 b) { return _mm512_xor_si512(a, b); }
inline Product multiply(I16 a, uint32_t b) {
  const I16 factor = _mm512_set1_epi32(int32_t(b));
  const I16 even = _mm512_mul_epu32(a, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
  return {_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd),
          _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32))};
}
// out[4 · i + w] = word w of lane i
inline void interleave(I16 a, I16 b, I16 c, I16 d, uint32_t* out) {
  const I16 ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
  const I16 cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
  const I16 rows[4] = {_mm512_unpacklo_epi64(ab0, cd0), _mm512_unpackhi_epi64(ab0, cd0),
                       _mm512_unpacklo_epi64(ab1, cd1), _mm512_unpackhi_epi64(ab1, cd1)};
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4 * i), _mm512_castsi512_si128(rows[i]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4 * i + 16), _mm512_extracti32x4_epi32(rows[i], 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4 * i + 32), _mm512_extracti32x4_epi32(rows[i], 2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4 * i + 48), _mm512_extracti32x4_epi32(rows[i], 3));
  }
}
#else
inline I16 xori(const I16& a, const I16& b) {
#if defined(__AVX2__)
  return {_mm256_xor_si256(a.a, b.a), _mm256_xor_si256(a.b, b.b)};
#else
  return {a.v ^ b.v};
#endif
}
inline Product multiply(const I16& a, uint32_t b) {
#if defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(int32_t(b));
  Product p;
  const __m256i even0 = _mm256_mul_epu32(a.a, factor), odd0 = _mm256_mul_epu32(_mm256_srli_epi64(a.a, 32), factor);
  const __m256i even1 = _mm256_mul_epu32(a.b, factor), odd1 = _mm256_mul_epu32(_mm256_srli_epi64(a.b, 32), factor);
  p.high = {_mm256_blend_epi32(_mm256_srli_epi64(even0, 32), odd0, 0xAA),
            _mm256_blend_epi32(_mm256_srli_epi64(even1, 32), odd1, 0xAA)};
  p.low = {_mm256_blend_epi32(even0, _mm256_slli_epi64(odd0, 32), 0xAA),
           _mm256_blend_epi32(even1, _mm256_slli_epi64(odd1, 32), 0xAA)};
  return p;
#else
  uint32_t x[16], high[16], low[16];
  store(static_cast<void*>(x), a);
  for (int i = 0; i < 16; ++i) {
    const uint64_t p = uint64_t(x[i]) * b;
    high[i] = uint32_t(p >> 32);
    low[i] = uint32_t(p);
  }
  return {load(static_cast<const void*>(high)), load(static_cast<const void*>(low))};
#endif
}
inline void interleave(const I16& a, const I16& b, const I16& c, const I16& d, uint32_t* out) {
  uint32_t words[4][16];
  store(static_cast<void*>(words[0]), a);
  store(static_cast<void*>(words[1]), b);
  store(static_cast<void*>(words[2]), c);
  store(static_cast<void*>(words[3]), d);
  for (int i = 0; i < 16; ++i)
    for (int w = 0; w < 4; ++w) out[4 * i + w] = words[w][i];
}
#endif

}  // namespace
}  // namespace FASTIGPT_ISA
}  // namespace fastigpt
