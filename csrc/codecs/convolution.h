// Convolutions as linear layers: a place of a padded picture, whose numbers lie side by side, is a row of inputs that
// overlaps its neighbours (operators/kernels.h, Rows), so nothing is gathered first.
#pragma once
#include <vector>

#include "codecs/pictures.h"
#include "operators/packing.h"

namespace fastigpt {

// Where a convolution's places are: all of a picture; those of one twice as large, in which each place is repeated; or
// every second one of every second row, the first being the corner, with zeros beyond the right and the lower end.
enum class Sampling { same, up, down };

class Convolution {
 public:
  // weight: [out][in][size][size], f32 or bf16; size 1 or 3, and 3 if places are not the same. In a picture that is
  // twice as large, places are of four kinds, by whether their row and their column are even: they see two by two of
  // the small one, and as many of the nine weights as fall on one of those are added up: 4/9 of the products.
  Convolution(const void* weight, DType stored, int out, int in, int size, Sampling sampling, DType dtype, int threads);

  int out() const { return out_; }

  // bias: float32 [out rounded up to 32]. `to`, another picture than what is read, becomes what comes out, of stored
  // dtype; if add, it is added to what is there. rooms: one for each thread, and one more, to work in.
  void apply(const Kernels& kernels, const LayerInput& input, const float* bias, Plane& to, DType stored, bool add,
             std::vector<Padded>& rooms) const;

 private:
  struct Phase {
    int row, column;  // of the places in the large picture, and where their inputs begin
    Linear layer;
    Buffer data;
  };
  DType dtype_;
  int out_, channels_, size_;  // channels: of what comes in, a multiple of 32
  int scale_, step_;           // places for each that comes in, along an axis, and those that come in for each place
  std::vector<Phase> phases_;
};

// A layer of these weights, f32 or bf16, in `data`: weight(o, i) is that of input i and output o.
template <class Weight>
Linear pack_layer(Buffer& data, int out, int in, DType dtype, int threads, const Weight& weight) {
  Linear layer;
  layer.dtype = dtype, layer.in = in, layer.out = out;
  layer.groups = (in + group_size(dtype) - 1) / group_size(dtype);
  data = Buffer(layer.panels() * layer.panel_bytes());
  layer.data = data.as<>();
  for_each_task(threads, layer.panels(), [&](int panel, int) {
    uint8_t* const to = data.as<>() + panel * layer.panel_bytes();
    for (int c = 0; c < kPanel && panel * kPanel + c < out; ++c)
      for (int i = 0; i < in; ++i) {
        const float w = weight(panel * kPanel + c, i);
        dtype == DType::f32 ? put_weight<DType::f32>(to, c, i, w) : put_weight<DType::bf16>(to, c, i, w);
      }
  });
  return layer;
}

}  // namespace fastigpt
