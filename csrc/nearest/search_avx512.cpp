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

#include "nearest/leaf_impl.h"

#include "nearest/cell_impl.h"

}  // namespace

#include "nearest/search_impl.h"

const BoxWork boxes = {keep, fill_box};

}  // namespace fastigpt::nearest_avx512
