// nearest_centroid with AVX-512.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "nearest/codebook.h"

namespace fastigpt::nearest_avx512 {
namespace {

#include "nearest/vectors_avx512.h"

namespace kernel {
#include "nearest/leaf_impl.h"

#include "nearest/search_impl.h"

#include "nearest/cell_impl.h"
}  // namespace kernel

}  // namespace

void nearest(const Codebook& book, const Tiles& tiles, const Block& block) { kernel::nearest(book, tiles, block); }
int64_t search(const Codebook& book, const Tree& tree, const float* points, int count, int64_t* out) {
  return kernel::search(book, tree, points, count, out);
}
void scan(const Codebook& book, const Leaves& leaves, const float* points, int count, int64_t* out) {
  kernel::scan(book, leaves, points, count, out);
}
const BoxWork boxes = {kernel::keep, kernel::fill_box};

}  // namespace fastigpt::nearest_avx512
