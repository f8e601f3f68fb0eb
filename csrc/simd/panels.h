// Panels, in which weights, keys and values lie (operators/kernels.h): products of one 64-byte group of a panel with a
// broadcast group of activations, and activations in the formats that these take.
#pragma once
#include "simd/vectors.h"

namespace fastigpt {
namespace FASTIGPT_ISA {
namespace {

// acc + Σ u·s over four unsigned bytes u and four signed bytes s in each lane, exact.
#if defined(__AVX512VNNI__)
inline I16 dot4(I16 acc, I16 u, I16 s) { return _mm512_dpbusd_epi32(acc, u, s); }
#elif defined(__AVX512F__)
inline I16 dot4(I16 acc, I16 u, I16 s) {
  const I16 even =
      _mm512_madd_epi16(_mm512_and_si512(u, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8));
  const I16 odd = _mm512_madd_epi16(_mm512_srli_epi16(u, 8), _mm512_srai_epi16(s, 8));
  return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
}
#elif defined(__AVX2__)
inline __m256i dot4_half(__m256i acc, __m256i u, __m256i s) {
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
inline I16 dot4(I16 acc, I16 u, I16 s) { return {dot4_half(acc.a, u.a, s.a), dot4_half(acc.b, u.b, s.b)}; }
#else
inline I16 dot4(const I16& acc, const I16& u, const I16& s) {
  const UVec v = (UVec)u.v, w = (UVec)s.v;
  return {acc.v + (IVec)(v & 255) * ((IVec)(w << 24) >> 24) + (IVec)((v >> 8) & 255) * ((IVec)(w << 16) >> 24) +
          (IVec)((v >> 16) & 255) * ((IVec)(w << 8) >> 24) + (IVec)(v >> 24) * ((IVec)w >> 24)};
}
#endif

inline I16 broadcast32(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return set1i(word);
}

// One kind of panel each. Act: a broadcast group of activations; Acc: sixteen running sums.
struct PanelF32 {
  using Elem = float;
  using Acc = F16;
  static constexpr int kGroup = 1, kPlanes = 1;
  static Acc none() { return zero(); }
  static F16 act(const Elem* p) { return set1(*p); }
  static Acc mac(Acc acc, I16 panel, F16 a) { return fma(as_float(panel), a, acc); }
};

#if defined(__AVX512BF16__)
struct PanelBf16 {
  using Elem = uint16_t;
  using Acc = F16;
  static constexpr int kGroup = 2, kPlanes = 1;
  static Acc none() { return zero(); }
  static I16 act(const Elem* p) { return broadcast32(p); }
  static Acc mac(Acc acc, I16 panel, I16 a) { return _mm512_dpbf16_ps(acc, (__m512bh)panel, (__m512bh)a); }
};
#else
struct PanelBf16 {  // bfloat16 in memory, float32 activations
  using Elem = float;
  using Acc = F16;
  static constexpr int kGroup = 2, kPlanes = 1;
  struct Pair { F16 low, high; };
  static Acc none() { return zero(); }
  static Pair act(const Elem* p) { return {set1(p[0]), set1(p[1])}; }
  static Acc mac(Acc acc, I16 panel, Pair a) {
    acc = fma(as_float(shift_left<16>(panel)), a.low, acc);
    return fma(as_float(andi(panel, set1i(int32_t(0xffff0000u)))), a.high, acc);
  }
};
#endif

struct PanelI8 {  // signed panel, unsigned activations: weights
  using Elem = uint8_t;
  using Acc = I16;
  static constexpr int kGroup = 4, kPlanes = 1;
  static Acc none() { return zeroi(); }
  static I16 act(const Elem* p) { return broadcast32(p); }
  static Acc mac(Acc acc, I16 panel, I16 a) { return dot4(acc, a, panel); }
};

struct PanelU8 {  // unsigned panel, signed activations in two planes: keys and values
  using Elem = int8_t;
  using Acc = I16;
  static constexpr int kGroup = 4, kPlanes = 2;
  static Acc none() { return zeroi(); }
  static I16 act(const Elem* p) { return broadcast32(p); }
  static Acc mac(Acc acc, I16 panel, I16 a) { return dot4(acc, panel, a); }
};

inline uint16_t to_bf16(float x) {  // nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Rounds sixteen floats into the activation format of PanelF32 or PanelBf16.
inline void store_act(float* p, F16 a) { store(p, a); }
inline void store_act(uint16_t* p, F16 a) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a));
#else
  float x[16];
  store(x, a);
  for (int i = 0; i < 16; ++i) p[i] = to_bf16(x[i]);
#endif
}

}  // namespace
}  // namespace FASTIGPT_ISA
}  // namespace fastigpt
