// The decoder of a VQ (fastigpt/codecs/vq_networks.py has its formula): entries of a codebook in, pixels out. What an
// image looks like depends on nothing but its entries, the weights, the dtype and the instruction set: not on threads.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fastigpt/dtype.h"
#include "fastigpt/isa.h"

namespace fastigpt {

struct VqWeights;

class VqDecoder {
 public:
  // dtype: f32 or bf16, of what is multiplied and kept; sums are float32.
  VqDecoder(DType dtype, Isa isa);
  ~VqDecoder();

  // A tensor of the decoder by its name, which is copied. dtype: f32 or bf16. shape: as PyTorch has it, contiguous.
  void load(const std::string& name, const void* data, DType dtype, const std::vector<int64_t>& shape, int threads);

  // entries: [height · width][dim]; pixels: [height · patch][width · patch][3], about −1 to 1. Throws
  // std::invalid_argument where a tensor is missing or does not fit, std::bad_alloc.
  void decode(const float* entries, int height, int width, int dim, float* pixels, int threads) const;

 private:
  std::unique_ptr<VqWeights> weights_;
};

}  // namespace fastigpt
