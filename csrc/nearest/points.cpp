// Points on their way in: widened to float32 from any layout, divided by their lengths, shared among threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "nearest/codebook.h"
#include "runtime/helpers.h"

namespace fastigpt {
namespace {

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

// Copies points [first, first + count) to rows, widened. Any layout: the position is kept as coordinates.
template <DType dtype>
void gather(const PointsView& points, int64_t first, int count, float* rows) {
  const int rank = int(points.shape.size());
  const auto size = int64_t(size_of(dtype));
  if (rank == 1 && points.dim_stride == size && points.strides[0] == points.dim * size) {  // one run in memory
    const char* p = static_cast<const char*>(points.data) + first * points.dim * size;
    for (int64_t i = 0; i < count * points.dim; ++i) rows[i] = widen<dtype>(p + i * size);
    return;
  }
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

}  // namespace

void gather(const PointsView& points, int64_t first, int count, float* rows) {
  switch (points.dtype) {
    case DType::u8: return gather<DType::u8>(points, first, count, rows);
    case DType::f16: return gather<DType::f16>(points, first, count, rows);
    case DType::bf16: return gather<DType::bf16>(points, first, count, rows);
    default: return gather<DType::f32>(points, first, count, rows);
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

void parallel(int64_t n, int threads, const std::function<void(int64_t)>& task) {
  std::atomic<int64_t> next{0};
  share(int(std::min<int64_t>(threads, n)), [&](int) {
    for (int64_t i; (i = next++) < n;) task(i);
  });
}

}  // namespace fastigpt
