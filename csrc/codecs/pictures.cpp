#include "codecs/pictures.h"

#include <cstring>

namespace fastigpt {
namespace {

void make_room(Buffer& buffer, size_t bytes) {
  if (buffer.size() < bytes) buffer = Buffer(), buffer = Buffer(bytes);  // never both at once
}

}  // namespace

void Plane::become(int new_height, int new_width, int new_channels, DType new_dtype) {
  height = new_height, width = new_width, channels = new_channels, dtype = new_dtype;
  make_room(data, size_t(height) * width * channels * size_of(dtype));
}

void Padded::become(const Kernels& kernels, const Plane& plane, DType weights, int border, int count) {
  weights_ = weights, border_ = border, first_ = 0, line_ = plane.width + 2 * border;
  place_bytes_ = plane.channels * kernels.activation_bytes(weights);
  make_room(data_, size_t(count) * line_ * place_bytes_);
}

void Padded::slide(int first, int end) {
  if (end > first) std::memmove(at(first_, 0), at(first, 0), (end - first) * line_ * place_bytes_);
  first_ = first;
}

void Padded::fill(const Kernels& kernels, const LayerInput& input, int first, int count) {
  const Plane& plane = input.plane;
  for (int i = first; i < first + count; ++i) {
    const int row = i - border_;
    if (row < 0 || row >= plane.height) {
      std::memset(at(i, 0), 0, line_ * place_bytes_);
      continue;
    }
    std::memset(at(i, 0), 0, border_ * place_bytes_);
    std::memset(at(i, line_ - border_), 0, border_ * place_bytes_);
    kernels.activate({plane.at(size_t(row) * plane.width * plane.channels), plane.dtype, plane.width, plane.channels,
                      input.scale, input.shift, input.silu, weights_, at(i, border_)});
  }
}

}  // namespace fastigpt
