// half as CUDA has it: 16 bits, converted to and from float32, to the nearest, ties to even.
#pragma once
#include "cuda/host/cuda_runtime.h"

struct __half { unsigned short bits; };
struct __half2 { __half x, y; } __attribute__((aligned(4)));
using half = __half;
using half2 = __half2;

inline float __half2float(__half h) {
  const unsigned sign = unsigned(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  if (exponent == 0) return __uint_as_float(sign | __float_as_uint(float(fraction) / float(1 << 24)));
  return __uint_as_float(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}
inline __half __float2half(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return {0x7fff};
  if (size >= 0x477ff000) return {static_cast<unsigned short>(sign | 0x7c00)};  // 65520 and more
  if (size < 0x38800000)                                                        // subnormal: in units of 2^-24
    return {static_cast<unsigned short>(sign | unsigned(std::nearbyint(__uint_as_float(size) * float(1 << 24))))};
  return {static_cast<unsigned short>(sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13)};
}
inline __half __float2half_rn(float value) { return __float2half(value); }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
