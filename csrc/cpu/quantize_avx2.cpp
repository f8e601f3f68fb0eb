// nearest_centroid with AVX2 and FMA.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "quantize.h"

namespace fastigpt::quantize_avx2 {
namespace {

constexpr int kLanes = 8, kPointVecs = 2;
using Vec = __m256;

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline unsigned not_above(Vec a, Vec b) { return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NGT_UQ))); }

namespace kernel {
#include "quantize_kernel.h"
}

}  // namespace

void nearest(const Codebook& book, const Block& block) { kernel::nearest(book, block); }

}  // namespace fastigpt::quantize_avx2
