// The networks of a VQ (fastigpt/codecs/vq_networks.py has their formulas): entries of a codebook to pixels, and pixels
// to what the nearest entries are looked for of. A result depends on nothing but the input, the weights, the dtype and
// the instruction set: not on threads.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fastigpt/dtype.h"
#include "fastigpt/isa.h"

namespace fastigpt {

struct VqWeights;

class VqNetworks {
 public:
  // dtype: f32 or bf16, of what is multiplied and kept; sums are float32.
  VqNetworks(DType dtype, Isa isa);
  ~VqNetworks();

  // A tensor by its name, which is copied; those of one network are enough to use it. dtype: f32 or bf16. shape: as
  // PyTorch has it, contiguous.
  void load(const std::string& name, const void* data, DType dtype, const std::vector<int64_t>& shape, int threads);

  // Both throw std::invalid_argument where a tensor is missing or does not fit, std::bad_alloc.
  // entries: [height · width][dim]; pixels: [height · patch][width · patch][3], about −1 to 1.
  void decode(const float* entries, int height, int width, int dim, float* pixels, int threads) const;
  // pixels: [height][width][3], both multiples of the patch; latents: [height / patch · width / patch][dim].
  void encode(const float* pixels, int height, int width, int dim, float* latents, int threads) const;

  void rest() const;  // gives back the memory that calls work in, which otherwise stays for the next one

 private:
  std::unique_ptr<VqWeights> weights_;
};

}  // namespace fastigpt
