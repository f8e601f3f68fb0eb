// nearest_centroid with AVX2 and FMA.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "nearest/codebook.h"

namespace fastigpt::nearest_avx2 {
namespace {

constexpr int kLanes = 8, kPointVecs = 2;
using Vec = __m256;

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec plus(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec times(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec pick_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline float lowest(Vec a) {
  __m128 low = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  low = _mm_min_ps(low, _mm_movehl_ps(low, low));
  return _mm_cvtss_f32(_mm_min_ss(low, _mm_movehdup_ps(low)));
}
inline int first_bit(unsigned mask) { return int(_mm_popcnt_u32(~mask & (mask - 1))); }
inline unsigned not_above(Vec a, Vec b) { return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NGT_UQ))); }

#include "nearest/leaf_impl.h"

#include "nearest/cell_impl.h"

}  // namespace

#include "nearest/search_impl.h"

#include "nearest/grid_impl.h"

const BoxWork boxes = {keep, fill_box};

}  // namespace fastigpt::nearest_avx2
