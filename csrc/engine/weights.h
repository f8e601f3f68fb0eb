// Weights as they lie in memory.
#pragma once
#include "operators/kernels.h"
#include "runtime/buffer.h"

namespace fastigpt {

// A linear layer; `data` lies in ModelImpl::linear_memory.
struct PackedLinear {
  Linear view;
  uint8_t* data = nullptr;
  bool loaded = false;
  Buffer scale, column_sum, bias;
};

struct LayerWeights {
  Buffer norm_1, norm_2;
  PackedLinear qkv, proj, fc, out;
};

}  // namespace fastigpt
