// Puts weights where kernels.h says they lie in a panel.
#pragma once
#include <cstring>

#include "operators/kernels.h"
#include "runtime/given.h"

namespace fastigpt {

// Of input i of the panel's output `column`.
template <DType dtype>
inline uint8_t* place_of_weight(uint8_t* panel, int column, int i) {
  constexpr int group = group_size(dtype), bytes = 4 / group;
  return panel + (size_t(i / group) * kPanel + column) * 4 + i % group * bytes;
}

// dtype: f32 or bf16.
template <DType dtype>
inline void put_weight(uint8_t* panel, int column, int i, float w) {
  uint8_t* const at = place_of_weight<dtype>(panel, column, i);
  if constexpr (dtype == DType::f32) {
    std::memcpy(at, &w, 4);
  } else {
    const uint16_t half = round_bf16(w);
    std::memcpy(at, &half, 2);
  }
}

}  // namespace fastigpt
