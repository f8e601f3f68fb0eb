// Weights as they are handed over, f32 or bf16 anywhere in memory, one number at a time.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fastigpt/dtype.h"

namespace fastigpt {

inline uint16_t round_bf16(float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct ReadFloat {
  const uint8_t* data;
  float operator()(size_t i) const {
    float x;
    std::memcpy(&x, data + i * 4, 4);
    return x;
  }
};

struct ReadBf16 {
  const uint8_t* data;
  float operator()(size_t i) const {
    uint16_t half;
    std::memcpy(&half, data + i * 2, 2);
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
};

struct Given {
  const void* data;
  DType dtype;
  size_t count;
  // Calls body with what reads number i.
  template <class Body>
  void read(Body&& body) const {
    const auto bytes = static_cast<const uint8_t*>(data);
    if (dtype == DType::bf16)
      body(ReadBf16{bytes});
    else
      body(ReadFloat{bytes});
  }
};

}  // namespace fastigpt
