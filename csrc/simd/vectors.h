// Sixteen floats or integers at a time, in three spellings: AVX-512, AVX2 (two halves), and the compiler's own vectors,
// which become SSE2 or NEON. Included by each kernels_*.cpp, inside a namespace of that file's instruction set, so that
// no function compiled for a wide machine can be picked by the linker for a narrow one. So is the rest of this folder.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 sees undefined inputs in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fastigpt {
namespace FASTIGPT_ISA {
namespace {

#if defined(__AVX512F__)

using F16 = __m512;
using I16 = __m512i;

inline F16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a); }
inline F16 set1(float a) { return _mm512_set1_ps(a); }
inline F16 zero() { return _mm512_setzero_ps(); }
inline F16 add(F16 a, F16 b) { return _mm512_add_ps(a, b); }
inline F16 sub(F16 a, F16 b) { return _mm512_sub_ps(a, b); }
inline F16 mul(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
inline F16 div(F16 a, F16 b) { return _mm512_div_ps(a, b); }
inline F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F16 max(F16 a, F16 b) { return _mm512_max_ps(a, b); }
inline F16 min(F16 a, F16 b) { return _mm512_min_ps(a, b); }
inline F16 select_less(F16 x, F16 y, F16 yes, F16 no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), no, yes);
}
inline I16 load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, I16 a) { _mm512_storeu_si512(p, a); }
inline I16 set1i(int32_t a) { return _mm512_set1_epi32(a); }
inline I16 zeroi() { return _mm512_setzero_si512(); }
inline I16 addi(I16 a, I16 b) { return _mm512_add_epi32(a, b); }
inline I16 subi(I16 a, I16 b) { return _mm512_sub_epi32(a, b); }
inline I16 andi(I16 a, I16 b) { return _mm512_and_si512(a, b); }
template <int S> inline I16 shift_left(I16 a) { return _mm512_slli_epi32(a, S); }
template <int S> inline I16 shift_right(I16 a) { return _mm512_srli_epi32(a, S); }
inline I16 nearest(F16 a) { return _mm512_cvtps_epi32(a); }  // ties to even
inline F16 to_float(I16 a) { return _mm512_cvtepi32_ps(a); }
inline F16 as_float(I16 a) { return _mm512_castsi512_ps(a); }
inline I16 as_int(F16 a) { return _mm512_castps_si512(a); }
inline I16 select_less_i(I16 x, I16 y, I16 yes, I16 no) {
  return _mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(x, y), no, yes);
}
inline F16 select_less_if(I16 x, I16 y, F16 yes, F16 no) {
  return _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(x, y), no, yes);
}
inline uint32_t mask_less_equal(F16 x, F16 y) { return _mm512_cmp_ps_mask(x, y, _CMP_LE_OQ); }
inline F16 abs(F16 a) { return _mm512_abs_ps(a); }

inline float reduce_add(F16 a) {
  __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline float reduce_max(F16 a) { return _mm512_reduce_max_ps(a); }
inline int32_t reduce_add_i(I16 a) { return _mm512_reduce_add_epi32(a); }

#elif defined(__AVX2__)

struct F16 { __m256 a, b; };
struct I16 { __m256i a, b; };

inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F16 sub(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F16 mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F16 div(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F16 fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F16 min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F16 select_less(F16 x, F16 y, F16 yes, F16 no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
inline I16 load(const void* p) {
  auto q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store(void* p, I16 x) {
  auto q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.a), _mm256_storeu_si256(q + 1, x.b);
}
inline I16 set1i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I16 zeroi() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I16 addi(I16 x, I16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I16 subi(I16 x, I16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I16 andi(I16 x, I16 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int S> inline I16 shift_left(I16 x) { return {_mm256_slli_epi32(x.a, S), _mm256_slli_epi32(x.b, S)}; }
template <int S> inline I16 shift_right(I16 x) { return {_mm256_srli_epi32(x.a, S), _mm256_srli_epi32(x.b, S)}; }
inline I16 nearest(F16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline F16 as_float(I16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline I16 as_int(F16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline I16 select_less_i(I16 x, I16 y, I16 yes, I16 no) {
  return {_mm256_blendv_epi8(no.a, yes.a, _mm256_cmpgt_epi32(y.a, x.a)),
          _mm256_blendv_epi8(no.b, yes.b, _mm256_cmpgt_epi32(y.b, x.b))};
}
inline F16 select_less_if(I16 x, I16 y, F16 yes, F16 no) {
  return as_float(select_less_i(x, y, as_int(yes), as_int(no)));
}
inline uint32_t mask_less_equal(F16 x, F16 y) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_LE_OQ))) |
         uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_LE_OQ))) << 8;
}
inline F16 abs(F16 x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
inline float reduce_add(F16 x) {
  const __m256 b = _mm256_add_ps(x.a, x.b);
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline float reduce_max(F16 x) {
  const __m256 b = _mm256_max_ps(x.a, x.b);
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
inline int32_t reduce_add_i(I16 x) {
  const __m256i b = _mm256_add_epi32(x.a, x.b);
  __m128i c = _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
  c = _mm_add_epi32(c, _mm_shuffle_epi32(c, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}

#else

typedef float FVec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t IVec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t UVec __attribute__((vector_size(64), aligned(4), may_alias));
struct F16 { FVec v; };
struct I16 { IVec v; };

inline F16 load(const float* p) { return {*reinterpret_cast<const FVec*>(p)}; }
inline void store(float* p, const F16& a) { *reinterpret_cast<FVec*>(p) = a.v; }
inline F16 set1(float a) { return {FVec{} + a}; }
inline F16 zero() { return {FVec{}}; }
inline F16 add(const F16& a, const F16& b) { return {a.v + b.v}; }
inline F16 sub(const F16& a, const F16& b) { return {a.v - b.v}; }
inline F16 mul(const F16& a, const F16& b) { return {a.v * b.v}; }
inline F16 div(const F16& a, const F16& b) { return {a.v / b.v}; }
inline F16 fma(const F16& a, const F16& b, const F16& c) { return {a.v * b.v + c.v}; }
inline F16 max(const F16& a, const F16& b) { return {a.v > b.v ? a.v : b.v}; }
inline F16 min(const F16& a, const F16& b) { return {a.v < b.v ? a.v : b.v}; }
inline F16 select_less(const F16& x, const F16& y, const F16& yes, const F16& no) { return {x.v < y.v ? yes.v : no.v}; }
inline I16 load(const void* p) { return {*static_cast<const IVec*>(p)}; }
inline void store(void* p, const I16& a) { *static_cast<IVec*>(p) = a.v; }
inline I16 set1i(int32_t a) { return {IVec{} + a}; }
inline I16 zeroi() { return {IVec{}}; }
inline I16 addi(const I16& a, const I16& b) { return {a.v + b.v}; }
inline I16 subi(const I16& a, const I16& b) { return {a.v - b.v}; }
inline I16 andi(const I16& a, const I16& b) { return {a.v & b.v}; }
template <int S> inline I16 shift_left(const I16& a) { return {(IVec)((UVec)a.v << S)}; }
template <int S> inline I16 shift_right(const I16& a) { return {(IVec)((UVec)a.v >> S)}; }
inline F16 to_float(const I16& a) { return {__builtin_convertvector(a.v, FVec)}; }
inline F16 as_float(const I16& a) { return {(FVec)a.v}; }
inline I16 as_int(const F16& a) { return {(IVec)a.v}; }
inline I16 nearest(const F16& a) {  // ties to even, for |a| < 2^22: the sum's last bit is worth one
  const FVec magic = FVec{} + 12582912.0f;
  return {(IVec)(a.v + magic) - (IVec)magic};
}
inline I16 select_less_i(const I16& x, const I16& y, const I16& yes, const I16& no) {
  return {x.v < y.v ? yes.v : no.v};
}
inline F16 select_less_if(const I16& x, const I16& y, const F16& yes, const F16& no) {
  return {x.v < y.v ? yes.v : no.v};
}
inline uint32_t mask_less_equal(const F16& x, const F16& y) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= uint32_t(x.v[i] <= y.v[i]) << i;
  return mask;
}
inline F16 abs(const F16& a) { return {(FVec)((IVec)a.v & 0x7fffffff)}; }
inline float reduce_add(const F16& a) {
  float s[16];
  store(s, a);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
}
inline float reduce_max(const F16& a) {
  float s = a.v[0];
  for (int i = 1; i < 16; ++i) s = a.v[i] > s ? a.v[i] : s;
  return s;
}
inline int32_t reduce_add_i(const I16& a) {
  int32_t s = 0;
  for (int i = 0; i < 16; ++i) s += a.v[i];
  return s;
}

#endif

inline void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }  // into the second-level cache

}  // namespace
}  // namespace FASTIGPT_ISA
}  // namespace fastigpt
