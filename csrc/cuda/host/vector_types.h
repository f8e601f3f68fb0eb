// CUDA's vector types, aligned as there.
#pragma once

#define FASTIGPT_VECTORS(name, T, align2, align4)                    \
  struct name##2 { T x, y; }                                         \
  __attribute__((aligned(align2)));                                  \
  struct name##3 { T x, y, z; };                                     \
  struct name##4 { T x, y, z, w; }                                   \
  __attribute__((aligned(align4)));                                  \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
FASTIGPT_VECTORS(char, signed char, 2, 4)
FASTIGPT_VECTORS(uchar, unsigned char, 2, 4)
FASTIGPT_VECTORS(short, short, 4, 8)
FASTIGPT_VECTORS(ushort, unsigned short, 4, 8)
FASTIGPT_VECTORS(int, int, 8, 16)
FASTIGPT_VECTORS(uint, unsigned, 8, 16)
FASTIGPT_VECTORS(float, float, 8, 16)
FASTIGPT_VECTORS(longlong, long long, 16, 16)
FASTIGPT_VECTORS(ulonglong, unsigned long long, 16, 16)
FASTIGPT_VECTORS(double, double, 16, 16)
#undef FASTIGPT_VECTORS

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
