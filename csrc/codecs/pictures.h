// Pictures as layers of a convolutional network leave them, and as the next layer reads them.
#pragma once
#include <atomic>
#include <vector>

#include "operators/kernels.h"
#include "runtime/buffer.h"
#include "runtime/helpers.h"

namespace fastigpt {

// Calls body(task, thread) for each task below `count` once, on up to `threads` threads, numbered from 0.
template <class Body>
void for_each_task(int threads, int count, const Body& body) {
  std::atomic<int> next{0};
  share(threads < count ? threads : count, [&](int thread) {
    for (int i; (i = next.fetch_add(1)) < count;) body(i, thread);
  });
}

// A picture, [height][width][channels] of f32 or bf16, channels a multiple of 32; and, of each of the parts in which it
// was computed, how many places it has and [3][channels] as operators/kernels.h says of Picture.
struct Plane {
  Buffer data;
  int height = 0, width = 0, channels = 0;
  DType dtype = DType::f32;
  std::vector<int> places;
  std::vector<float> sums;

  // Another picture, whose numbers are undefined, in the same memory if it is enough.
  void become(int new_height, int new_width, int new_channels, DType new_dtype);
  uint8_t* at(size_t number) const { return data.as<>() + number * size_of(dtype); }
};

// What a layer reads: a picture, scaled and shifted by channel ([channels], or both null), then x · sigmoid(x) if silu.
struct LayerInput {
  const Plane& plane;
  const float *scale = nullptr, *shift = nullptr;
  bool silu = false;
};

// Lines of a picture as activations, with a border of zeros on all four sides, [width + 2 border][channels] each.
class Padded {
 public:
  // Room for `count` lines, the first of which is the uppermost of the border.
  void become(const Kernels& kernels, const Plane& plane, DType weights, int border, int count);
  // The first line here is now `first`; those from there up to `end` stay.
  void slide(int first, int end);
  // Puts `count` lines from `first` on here.
  void fill(const Kernels& kernels, const LayerInput& input, int first, int count);
  int line() const { return line_; }  // places
  size_t place_bytes() const { return place_bytes_; }
  uint8_t* at(int line, int place) const {
    return data_.as<>() + (size_t(line - first_) * line_ + place) * place_bytes_;
  }

 private:
  Buffer data_;
  DType weights_ = DType::f32;
  int border_ = 0, first_ = 0, line_ = 0;
  size_t place_bytes_ = 0;
};

}  // namespace fastigpt
