// nearest_centroid on the CPU: exact, over blocks of 64 points, by brute force or by a k-d tree.
//
// By the tree (few dimensions, many centroids): leaves of 16 centroids are opened in SIMD while their boxes are no
// farther than the best centroid so far; what float32 leaves open, float64 or exact arithmetic decides. Where the
// codebook is such that too many leaves are opened, the call goes on by brute force: the result is the same.
//
// By brute force, in two passes. The first pass finds, in float32 and in the cheap form |c|^2 - 2 x.c, the smallest
// value in each group of centroids. Its rounding error has a bound, so every centroid that could be nearest lies in a
// group whose smallest value is within that bound of the overall smallest: nearly always one group. The second pass
// looks into those groups with direct float64 distances, and where two of them are too close for float64, in exact
// arithmetic. Points and centroids are centred on the codebook's mean first, which keeps the bound small wherever the
// data lie.
#include "nearest/codebook.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "fastigpt/nearest_centroid.h"
#include "runtime/helpers.h"

namespace fastigpt {
namespace {

constexpr double kEpsilon = 1.0 / (1 << 24);  // unit roundoff of float32

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent == 0) {
    const float magnitude = float(fraction) * (1.0f / (1 << 24));
    return sign ? -magnitude : magnitude;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

template <DType dtype>
float widen(const char* p) {
  if constexpr (dtype == DType::u8) {
    return *reinterpret_cast<const uint8_t*>(p);
  } else if constexpr (dtype == DType::f32) {
    float f;
    std::memcpy(&f, p, sizeof f);
    return f;
  } else {
    uint16_t h;
    std::memcpy(&h, p, sizeof h);
    if constexpr (dtype == DType::f16) return half_to_float(h);
    const uint32_t bits = uint32_t(h) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
  }
}

bool normalise(float* row, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += double(row[d]) * row[d];
  if (sum == 0) return false;
  const double length = std::sqrt(sum);
  for (int64_t d = 0; d < dim; ++d) row[d] = float(row[d] / length);
  return true;
}

struct Searches {
  void (*nearest)(const Codebook&, const Block&);
  int64_t (*search)(const Tree&, const float*, int, int64_t*);
};

Searches searches_of(Isa isa) {
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
  if (isa >= Isa::avx512) return {nearest_avx512::nearest, nearest_avx512::search};
  if (isa == Isa::avx2) return {nearest_avx2::nearest, nearest_avx2::search};
#endif
  (void)isa;
  return {nearest_generic::nearest, nearest_generic::search};
}

// Position of the first of `count` rows that is not finite, or -1.
int first_not_finite(const float* rows, int count, int64_t dim) {
  float sum = 0;
  for (int64_t i = 0; i < count * dim; ++i) sum += rows[i] * 0;
  if (sum == 0) return -1;
  for (int64_t i = 0;; ++i)
    if (!std::isfinite(rows[i])) return int(i / dim);
}

// Buffers of one thread.
struct BlockBuffers {
  explicit BlockBuffers(const Codebook& book)
      : rows(kBlock * book.dim), centred(kBlock * book.dim), slack(kBlock), low(kBlock),
        group_min(kBlock * book.n_groups) {}
  std::vector<float> rows, centred, slack, low, group_min;
  int64_t index[kBlock];
  double distance[kBlock];
  bool zero[kBlock];
};

// Copies points [first, first + count) into w.rows, widened. Any layout: the position is kept as coordinates.
template <DType dtype>
void gather(const PointsView& points, int64_t first, int count, float* rows) {
  const int rank = int(points.shape.size());
  std::vector<int64_t> at(rank);
  const char* p = static_cast<const char*>(points.data);
  for (int axis = rank - 1; axis >= 0; --axis) {
    at[axis] = first % points.shape[axis];
    first /= points.shape[axis];
    p += at[axis] * points.strides[axis];
  }
  for (int i = 0; i < count; ++i) {
    for (int64_t d = 0; d < points.dim; ++d) *rows++ = widen<dtype>(p + d * points.dim_stride);
    for (int axis = rank - 1; axis >= 0; --axis) {
      p += points.strides[axis];
      if (++at[axis] < points.shape[axis]) break;
      p -= points.shape[axis] * points.strides[axis];
      at[axis] = 0;
    }
  }
}

// Centres the block's points and bounds the error of the first pass.
void centre(const Codebook& book, const float* rows, int count, BlockBuffers& w) {
  const double radius = std::sqrt(book.radius2);
  for (int p = 0; p < kBlock; ++p) {
    double norm2 = 0;
    for (int64_t d = 0; d < book.dim; ++d) {
      const float x = p < count ? rows[p * book.dim + d] - book.mean[d] : 0;
      w.centred[d * kBlock + p] = x;
      norm2 += double(x) * x;
    }
    const double size = book.radius2 + 2 * radius * std::sqrt(norm2);
    w.slack[p] =
        size < 1e37 ? float(2.1 * (book.dim + 10) * kEpsilon * size + 1e-36) : std::numeric_limits<float>::infinity();
    w.index[p] = 0;
    w.distance[p] = std::numeric_limits<double>::infinity();
  }
}

}  // namespace

void gather(const PointsView& points, int64_t first, int count, float* rows) {
  switch (points.dtype) {
    case DType::u8: return gather<DType::u8>(points, first, count, rows);
    case DType::f16: return gather<DType::f16>(points, first, count, rows);
    case DType::bf16: return gather<DType::bf16>(points, first, count, rows);
    default: return gather<DType::f32>(points, first, count, rows);
  }
}

void parallel(int64_t n, int threads, const std::function<void(int64_t)>& task) {
  std::atomic<int64_t> next{0};
  share(int(std::min<int64_t>(threads, n)), [&](int) {
    for (int64_t i; (i = next++) < n;) task(i);
  });
}

Codebook::Codebook(const float* centroids, int64_t k, int64_t dim, bool cosine)
    : k(k), dim(dim), tolerance(double(dim + 8) * std::numeric_limits<double>::epsilon()), radius2(0),
      rows(centroids, centroids + k * dim), mean(dim) {
  group = std::max<int64_t>(1, (k + kMaxGroups * kStep - 1) / (kMaxGroups * kStep)) * kStep;
  n_groups = (k + group - 1) / group;
  if (cosine)
    for (int64_t i = 0; i < k; ++i) normalise(&rows[i * dim], dim);
  for (int64_t d = 0; d < dim; ++d) {
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += rows[i * dim + d];
    mean[d] = float(sum / double(k));
  }
  const float infinity = std::numeric_limits<float>::infinity();
  tiles.assign(n_groups * group * (dim + 1), 0);
  columns.assign(n_groups * group * dim, 0);
  for (int64_t i = 0; i < n_groups * group; ++i) {
    float* tile = &tiles[i / kTile * (dim + 1) * kTile + i % kTile];
    float* column = &columns[i / group * dim * group + i % group];
    tile[0] = infinity;
    if (i >= k) continue;
    double norm2 = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const float c = rows[i * dim + d] - mean[d];
      norm2 += double(c) * c;
      tile[(d + 1) * kTile] = -2 * c;
      column[d * group] = rows[i * dim + d];
    }
    tile[0] = float(norm2);
    radius2 = std::max(radius2, norm2);
  }
}

void Block::challenge(const Codebook& book, int p, int64_t j, double d2) const {
  const bool close = d2 >= distance[p] * (1 - book.tolerance) && distance[p] < std::numeric_limits<double>::infinity();
  if (close && !beats(book.rows.data(), rows + p * book.dim, book.dim, j, index[p])) return;
  distance[p] = d2;
  index[p] = j;
}

int64_t nearest_centroid_cpu(const PointsView& points, const float* centroids, int64_t k, bool cosine, int64_t* indices,
                             float* distances, Isa isa, int threads) {
  const Codebook book(centroids, k, points.dim, cosine);
  const Searches searches = searches_of(isa);
  const int64_t n = points.size(), dim = points.dim, blocks = (n + kBlock - 1) / kBlock;
  std::unique_ptr<Tree> tree;
  if (k >= 64 && dim <= Tree::kMaxDim && n >= 64) tree = std::make_unique<Tree>(book.rows, k, dim);
  // Work of one point in vectors of 16: what a leaf costs with its share of the branches, and all centroids at once.
  const double leaf_cost = 3.5 * double(dim) + 12, brute_cost = 0.8 * double(k) / 16 * double(dim + 2);
  std::atomic<int64_t> bad{-1}, opened{0}, searched{0};
  const bool in_place = points.dtype == DType::f32 && !cosine && points.shape.size() == 1 && points.dim_stride == 4 &&
                        points.strides[0] == 4 * dim;
  constexpr int64_t kChunk = 16;  // blocks

  // A thread takes some 20 us to wake: worth it from about a million multiply-adds each.
  const double operations = double(n) * double(k) * double(dim);
  parallel((blocks + kChunk - 1) / kChunk, int(std::min<double>(threads, operations / 1e6 + 1)), [&](int64_t chunk) {
    BlockBuffers w(book);
    for (int64_t b = chunk * kChunk; b < std::min(blocks, (chunk + 1) * kChunk) && bad < 0; ++b) {
      const int64_t first = b * kBlock;
      const int count = int(std::min<int64_t>(kBlock, n - first));
      const float* rows = w.rows.data();
      if (in_place)
        rows = static_cast<const float*>(points.data) + first * dim;
      else
        gather(points, first, count, w.rows.data());
      const int wrong = first_not_finite(rows, count, dim);
      if (wrong >= 0) {
        bad = first + wrong;
        return;
      }
      if (cosine)
        for (int p = 0; p < count; ++p) w.zero[p] = !normalise(&w.rows[p * dim], dim);
      if (tree && double(opened) * leaf_cost <= double(searched) * brute_cost) {
        opened += searches.search(*tree, rows, count, indices + first);
        searched += count;
      } else {
        const Block block{count,        rows,    w.centred.data(), w.slack.data(), w.group_min.data(),
                          w.low.data(), w.index, w.distance};
        centre(book, rows, count, w);
        searches.nearest(book, block);
        std::copy(w.index, w.index + count, indices + first);
      }
      for (int p = 0; p < count; ++p) {
        const bool zero = cosine && w.zero[p];
        if (zero) indices[first + p] = 0;
        if (distances)
          distances[first + p] =
              zero ? 1 : float(direct_distance(rows + p * dim, &book.rows[indices[first + p] * dim], dim));
      }
    }
  });
  return bad;
}

}  // namespace fastigpt
