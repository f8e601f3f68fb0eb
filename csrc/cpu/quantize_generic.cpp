// nearest_centroid for any processor: plain loops over four lanes, which compilers turn into what the baseline has.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "quantize.h"

namespace fastigpt::quantize_generic {
namespace {

constexpr int kLanes = 4, kPointVecs = 2;
struct Vec {
  float lane[kLanes];
};

inline Vec load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline void store(float* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = a.lane[i];
}
inline Vec broadcast(const float* p) { return {{*p, *p, *p, *p}}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}
inline Vec min(Vec a, Vec b) {
  for (int i = 0; i < kLanes; ++i) b.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
  return b;
}
inline unsigned not_above(Vec a, Vec b) {
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= unsigned(!(a.lane[i] > b.lane[i])) << i;
  return mask;
}

namespace kernel {
#include "quantize_kernel.h"
}

}  // namespace

void nearest(const Codebook& book, const Block& block) { kernel::nearest(book, block); }

}  // namespace fastigpt::quantize_generic
