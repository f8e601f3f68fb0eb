// Weights as they lie in memory.
#pragma once
#include <memory>
#include <vector>

#include "fastigpt/decode.h"
#include "operators/kernels.h"
#include "runtime/buffer.h"

namespace fastigpt {

// A linear layer; `data` lies in ModelImpl::linear_memory.
struct PackedLinear {
  Linear view;
  std::vector<int> order;  // [view.out]: which row of the weights an output is, −1: none
  uint8_t* data = nullptr;
  bool loaded = false;
  Buffer scale, column_sum, bias;
};

// Rows that are looked up, in f32 or bf16, where they were handed over or copied.
struct Table {
  const uint8_t* row(int64_t i) const { return data + size_t(i) * row_bytes; }
  explicit operator bool() const { return data != nullptr; }
  const uint8_t* data = nullptr;
  DType dtype = DType::f32;
  size_t row_bytes = 0;
  std::shared_ptr<const void> owner;
};

// Orders of outputs. As the weights have them; with the pairs that rotary positions turn, p and p + head_dim / 2 of
// each head of queries and keys, side by side; and gates beside what they gate, as Sink::gated_silu reads them.
std::vector<int> plain_order(int rows);
std::vector<int> qkv_order(const ModelShape& shape);
std::vector<int> fc_order(const ModelShape& shape);

struct LayerWeights {
  Buffer norm_1, norm_2;
  PackedLinear qkv, proj, fc, out;
};

}  // namespace fastigpt
