// Sixteen floats or integers at a time, in three spellings: AVX-512, AVX2 (two halves), and the compiler's own vectors,
// which become SSE2 or NEON. Included once by each kernels_*.cpp, inside a namespace of that file's instruction set, so
// that no function compiled for a wide machine can be picked by the linker for a narrow one.
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
inline I16 select_less_i(I16 x, I16 y, I16 yes, I16 no) { return _mm512_mask_blend_epi32(_mm512_cmplt_epi32_mask(x, y), no, yes); }
inline F16 select_less_if(I16 x, I16 y, F16 yes, F16 no) { return _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(x, y), no, yes); }
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
inline F16 select_less_if(I16 x, I16 y, F16 yes, F16 no) { return as_float(select_less_i(x, y, as_int(yes), as_int(no))); }
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
inline I16 select_less_i(const I16& x, const I16& y, const I16& yes, const I16& no) { return {x.v < y.v ? yes.v : no.v}; }
inline F16 select_less_if(const I16& x, const I16& y, const F16& yes, const F16& no) { return {x.v < y.v ? yes.v : no.v}; }
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

// --- what the random numbers need ---------------------------------------------------------------------------------------

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
  const I16 rows[4] = {_mm512_unpacklo_epi64(ab0, cd0), _mm512_unpackhi_epi64(ab0, cd0), _mm512_unpacklo_epi64(ab1, cd1),
                       _mm512_unpackhi_epi64(ab1, cd1)};
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
  p.high = {_mm256_blend_epi32(_mm256_srli_epi64(even0, 32), odd0, 0xAA), _mm256_blend_epi32(_mm256_srli_epi64(even1, 32), odd1, 0xAA)};
  p.low = {_mm256_blend_epi32(even0, _mm256_slli_epi64(odd0, 32), 0xAA), _mm256_blend_epi32(even1, _mm256_slli_epi64(odd1, 32), 0xAA)};
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

// --- products of one 64-byte group of a panel with a broadcast group of activations -----------------------------------

// acc + Σ u·s over four unsigned bytes u and four signed bytes s in each lane, exact.
#if defined(__AVX512VNNI__)
inline I16 dot4(I16 acc, I16 u, I16 s) { return _mm512_dpbusd_epi32(acc, u, s); }
#elif defined(__AVX512F__)
inline I16 dot4(I16 acc, I16 u, I16 s) {
  const I16 even = _mm512_madd_epi16(_mm512_and_si512(u, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8));
  const I16 odd = _mm512_madd_epi16(_mm512_srli_epi16(u, 8), _mm512_srai_epi16(s, 8));
  return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
}
#elif defined(__AVX2__)
inline __m256i dot4_half(__m256i acc, __m256i u, __m256i s) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
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

// --- functions ---------------------------------------------------------------------------------------------------------

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

inline void prefetch(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }  // into the second-level cache

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
