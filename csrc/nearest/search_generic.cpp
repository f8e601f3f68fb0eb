// nearest_centroid for any processor: plain loops over four lanes, which compilers turn into what the baseline has.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "nearest/codebook.h"

namespace fastigpt::nearest_generic {
namespace {

constexpr int kLanes = 4, kPointVecs = 2;
struct Vec { float lane[kLanes]; };

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
inline Vec max(Vec a, Vec b) {
  for (int i = 0; i < kLanes; ++i) b.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return b;
}
inline Vec plus(Vec a, Vec b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline Vec times(Vec a, Vec b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
  return a;
}
inline Vec sub(Vec a, Vec b) {
  for (int i = 0; i < kLanes; ++i) a.lane[i] -= b.lane[i];
  return a;
}
inline Vec pick_less(Vec a, Vec b, Vec yes, Vec no) {
  for (int i = 0; i < kLanes; ++i) no.lane[i] = a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i];
  return no;
}
inline float lowest(Vec a) {
  float low = a.lane[0];
  for (int i = 1; i < kLanes; ++i) low = a.lane[i] < low ? a.lane[i] : low;
  return low;
}
inline int first_bit(unsigned mask) {
  int bit = 0;
  for (; !(mask & 1); mask >>= 1) ++bit;
  return bit;
}
inline unsigned not_above(Vec a, Vec b) {
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= unsigned(!(a.lane[i] > b.lane[i])) << i;
  return mask;
}

#include "nearest/leaf_impl.h"

#include "nearest/cell_impl.h"

}  // namespace

#include "nearest/search_impl.h"

#include "nearest/grid_impl.h"

const BoxWork boxes = {keep, fill_box};

}  // namespace fastigpt::nearest_generic
