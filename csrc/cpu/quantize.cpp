// nearest_centroid on the CPU: exact, in two passes over blocks of 64 points.
//
// The first pass finds, in float32 and in the cheap form |c|^2 - 2 x.c, the smallest value in each group of centroids.
// Its rounding error has a bound, so every centroid that could be nearest lies in a group whose smallest value is within
// that bound of the overall smallest: nearly always one group. The second pass looks into those groups with direct
// float64 distances, and where two of them are too close for float64, with twice that precision. Points and centroids
// are centred on the codebook's mean first, which keeps the bound small wherever the data lie.
#include "quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "fastigpt/quantize.h"

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

template <Scalar type>
float widen(const char* p) {
  if constexpr (type == Scalar::u8) {
    return *reinterpret_cast<const uint8_t*>(p);
  } else if constexpr (type == Scalar::f32) {
    float f;
    std::memcpy(&f, p, sizeof f);
    return f;
  } else {
    uint16_t h;
    std::memcpy(&h, p, sizeof h);
    if constexpr (type == Scalar::f16) return half_to_float(h);
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

using Kernel = void (*)(const Codebook&, const Block&);

Kernel kernel_of(Isa isa) {
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
  if (isa >= Isa::avx512) return quantize_avx512::nearest;
  if (isa == Isa::avx2) return quantize_avx2::nearest;
#endif
  (void)isa;
  return quantize_generic::nearest;
}

// Buffers of one thread.
struct Workspace {
  explicit Workspace(const Codebook& book)
      : rows(kBlock * book.dim), centred(kBlock * book.dim), slack(kBlock), low(kBlock), group_min(kBlock * book.n_groups) {}
  std::vector<float> rows, centred, slack, low, group_min;
  int64_t index[kBlock];
  double distance[kBlock];
  bool zero[kBlock];
};

// Copies points [first, first + count) into w.rows, widened. Any layout: the position is kept as coordinates.
template <Scalar type>
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
    for (int64_t d = 0; d < points.dim; ++d) *rows++ = widen<type>(p + d * points.dim_stride);
    for (int axis = rank - 1; axis >= 0; --axis) {
      p += points.strides[axis];
      if (++at[axis] < points.shape[axis]) break;
      p -= points.shape[axis] * points.strides[axis];
      at[axis] = 0;
    }
  }
}

// Centres the block's points and bounds the error of the first pass. Returns the position of a point that is not
// finite, or -1.
int centre(const Codebook& book, Workspace& w, int count) {
  const double radius = std::sqrt(book.radius2);
  for (int p = 0; p < kBlock; ++p) {
    double norm2 = 0;
    for (int64_t d = 0; d < book.dim; ++d) {
      const float x = p < count ? w.rows[p * book.dim + d] - book.mean[d] : 0;
      w.centred[d * kBlock + p] = x;
      norm2 += double(x) * x;
    }
    if (!(norm2 < 1e300))  // infinite or NaN, or an overflow of the subtraction
      for (int64_t d = 0; d < book.dim; ++d)
        if (!std::isfinite(w.rows[p * book.dim + d])) return p;
    const double size = book.radius2 + 2 * radius * std::sqrt(norm2);
    w.slack[p] = size < 1e37 ? float(2.1 * (book.dim + 10) * kEpsilon * size + 1e-36) : std::numeric_limits<float>::infinity();
    w.index[p] = 0;
    w.distance[p] = std::numeric_limits<double>::infinity();
  }
  return -1;
}

}  // namespace

void gather(const PointsView& points, int64_t first, int count, float* rows) {
  switch (points.type) {
    case Scalar::u8: return gather<Scalar::u8>(points, first, count, rows);
    case Scalar::f16: return gather<Scalar::f16>(points, first, count, rows);
    case Scalar::bf16: return gather<Scalar::bf16>(points, first, count, rows);
    case Scalar::f32: return gather<Scalar::f32>(points, first, count, rows);
  }
}

void Double2::add(double x) {
  const double s = hi + x, t = s - hi;
  lo += (hi - (s - t)) + (x - t);
  hi = s;
}

bool Double2::operator<(const Double2& other) const {
  const double high = hi - other.hi;  // exact where it matters: the two are nearly equal
  return high < other.lo - lo;
}

Double2 exact_distance(const double* x, const double* c, int64_t dim) {
  Double2 sum{0, 0};
  for (int64_t d = 0; d < dim; ++d) {
    const double t = x[d] - c[d], back = x[d] - t;
    const double rest = (x[d] - (t + back)) + (back - c[d]);  // x - c = t + rest exactly
    const double square = t * t;
    sum.add(square);
    sum.add(std::fma(t, t, -square));
    sum.add(2 * t * rest);
  }
  return sum;
}

void parallel(int64_t n, int threads, const std::function<void(int64_t)>& task) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next++) < n;) task(i);
  };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < std::min<int64_t>(threads, n); ++i) helpers.emplace_back(work);
  work();
  for (auto& helper : helpers) helper.join();
}

Codebook::Codebook(const float* centroids, int64_t k, int64_t dim, bool cosine)
    : k(k), dim(dim), tolerance(double(dim + 8) * std::numeric_limits<double>::epsilon()), radius2(0), rows(centroids, centroids + k * dim), mean(dim) {
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
  if (d2 >= distance[p] * (1 - book.tolerance) && distance[p] < std::numeric_limits<double>::infinity()) {
    const float *x = rows + p * book.dim, *a = &book.rows[j * book.dim], *b = &book.rows[index[p] * book.dim];
    const std::vector<double> point(x, x + book.dim), challenger(a, a + book.dim), champion(b, b + book.dim);
    if (!(exact_distance(point.data(), challenger.data(), book.dim) < exact_distance(point.data(), champion.data(), book.dim)))
      return;
  }
  distance[p] = d2;
  index[p] = j;
}

int64_t nearest_centroid_cpu(const PointsView& points, const float* centroids, int64_t k, bool cosine, int64_t* indices,
                             float* distances, Isa isa, int threads) {
  const Codebook book(centroids, k, points.dim, cosine);
  const Kernel kernel = kernel_of(isa);
  const int64_t n = points.size(), blocks = (n + kBlock - 1) / kBlock;
  std::atomic<int64_t> next{0}, bad{-1};

  const auto work = [&] {
    Workspace w(book);
    const Block block{0, w.rows.data(), w.centred.data(), w.slack.data(), w.group_min.data(), w.low.data(), w.index, w.distance};
    for (int64_t b; (b = next++) < blocks && bad < 0;) {
      const int64_t first = b * kBlock;
      Block now = block;
      now.count = int(std::min<int64_t>(kBlock, n - first));
      gather(points, first, now.count, w.rows.data());
      if (cosine)
        for (int p = 0; p < now.count; ++p) w.zero[p] = !normalise(&w.rows[p * points.dim], points.dim);
      const int wrong = centre(book, w, now.count);
      if (wrong >= 0) {
        bad = first + wrong;
        return;
      }
      kernel(book, now);
      for (int p = 0; p < now.count; ++p) {
        const bool zero = cosine && w.zero[p];
        indices[first + p] = zero ? 0 : w.index[p];
        if (distances) distances[first + p] = zero ? 1 : float(w.distance[p]);
      }
    }
  };
  // A thread costs some 20 us to start: worth it from about a million multiply-adds each.
  const double operations = double(n) * double(k) * double(points.dim);
  const int64_t wanted = std::min<int64_t>({threads, blocks, int64_t(operations / 1e6) + 1});
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < wanted; ++i) helpers.emplace_back(work);
  work();
  for (auto& helper : helpers) helper.join();
  return bad;
}

}  // namespace fastigpt
