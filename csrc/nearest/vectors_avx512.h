// Sixteen float32 numbers for the searches. Included inside a namespace of each file that uses them, after
// <immintrin.h>.

#if defined(__GNUC__) && !defined(__clang__)  // false alarms inside gcc 12's own _mm512_min_ps and the like
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

constexpr int kLanes = 16, kPointVecs = 4;
using Vec = __m512;

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline Vec broadcast(const float* p) { return _mm512_set1_ps(*p); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec plus(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec pick_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
inline float lowest(Vec a) { return _mm512_reduce_min_ps(a); }
inline int first_bit(unsigned mask) { return int(_mm_popcnt_u32(~mask & (mask - 1))); }
inline unsigned not_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NGT_UQ); }
