// What convolutional networks need beside linear layers, written once for all instruction sets: outputs that are places
// of a picture, with the sums that norms over the whole picture are made of; pictures as activations; softmax.
#pragma once
#include "operators/kernels.h"
#include "simd/functions.h"
#include "simd/panels.h"

namespace fastigpt {
namespace FASTIGPT_ISA {
namespace {

// Sixteen stored numbers.
inline F16 load_stored(const float* p) { return load(p); }
inline F16 load_stored(const uint16_t* p) {
#if defined(__AVX512F__)
  return as_float(shift_left<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))));
#elif defined(__AVX2__)
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return as_float(
      shift_left<16>(I16{_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1))}));
#else
  int32_t wide[16];
  for (int i = 0; i < 16; ++i) wide[i] = p[i];
  return as_float(shift_left<16>(load(static_cast<const void*>(wide))));
#endif
}

template <class T>
void finish_places(const Linear& layer, const Picture& to, int rows, int row0, int column, const float* tile) {
  float* const sums = to.sums + column;
  const int next = layer.panels() * kPanel;  // numbers between rows of sums
  F16 bias[2], first[2], sum[2], squares[2];
  for (int c = 0; c < 2; ++c) {
    bias[c] = layer.bias ? load(layer.bias + column + c * 16) : zero();
    first[c] = load(sums + c * 16), sum[c] = load(sums + next + c * 16), squares[c] = load(sums + 2 * next + c * 16);
  }
  int x = row0 % to.line;
  size_t at = row0 / to.line * to.row + x * to.step + column;
  for (int r = 0; r < rows; ++r, tile += kPanel) {
    if (x < to.width)
      for (int c = 0; c < 2; ++c) {
        F16 y = add(load(tile + c * 16), bias[c]);
        if (to.add) y = add(y, load_stored(static_cast<const T*>(to.add) + at + c * 16));
        store_act(static_cast<T*>(to.out) + at + c * 16, y);
        if (row0 + r == 0) first[c] = y;
        const F16 above = sub(y, first[c]);
        sum[c] = add(sum[c], above);
        squares[c] = fma(above, above, squares[c]);
      }
    at += to.step;
    if (++x == to.line) x = 0, at += to.row - to.line * to.step;
  }
  for (int c = 0; c < 2; ++c)
    store(sums + c * 16, first[c]), store(sums + next + c * 16, sum[c]), store(sums + 2 * next + c * 16, squares[c]);
}

void finish_picture(const Linear& layer, const Picture& to, int rows, int row0, int column, const float* tile) {
  if (to.dtype == DType::f32)
    finish_places<float>(layer, to, rows, row0, column, tile);
  else
    finish_places<uint16_t>(layer, to, rows, row0, column, tile);
}

// x · sigmoid(x), to about 3e-7 of it. The polynomial is 2^r's best of its degree for |r| ≤ 1/2 (to 8e-8); a quotient
// would take as long as all else together, the first 14 bits of the inverse and one step of Newton's do not.
inline F16 silu16(F16 x) {
#if defined(__AVX512F__)
  const F16 t = _mm512_min_ps(_mm512_mul_ps(x, set1(-1.44269504f)), set1(126.0f));
  const F16 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = sub(t, n);
  F16 p = fma(r, set1(1.3276472454890609e-3f), set1(9.675540961325169e-3f));
  p = fma(p, r, set1(5.550713092088699e-2f));
  p = fma(p, r, set1(0.24022120237350464f));
  p = fma(p, r, set1(0.6931469440460205f));
  p = fma(p, r, set1(1.0000001192092896f));
  const F16 d = add(set1(1.0f), _mm512_scalef_ps(p, n)), y = _mm512_rcp14_ps(d);
  return mul(x, mul(y, _mm512_fnmadd_ps(d, y, set1(2.0f))));
#else
  return gated(x, 1.0f);
#endif
}

template <bool scaled, bool silu, class T, class Elem>
void activate_rows(const T* x, int places, int channels, const float* scale, const float* shift, Elem* out) {
  for (int p = 0; p < places; ++p, x += channels, out += channels)
    for (int i = 0; i < channels; i += 32) {
      F16 y[2];
      for (int c = 0; c < 2; ++c) {
        y[c] = load_stored(x + i + c * 16);
        if constexpr (scaled) y[c] = fma(y[c], load(scale + i + c * 16), load(shift + i + c * 16));
        if constexpr (silu) y[c] = silu16(y[c]);
      }
      for (int c = 0; c < 2; ++c) store_act(out + i + c * 16, y[c]);
    }
}

template <class T, class Elem>
void activate_as(const Activate& job) {
  const auto rows = job.silu    ? activate_rows<true, true, T, Elem>
                    : job.scale ? activate_rows<true, false, T, Elem>
                                : activate_rows<false, false, T, Elem>;
  rows(static_cast<const T*>(job.x), job.places, job.channels, job.scale, job.shift, reinterpret_cast<Elem*>(job.out));
}

void activate(const Activate& job) {
  const bool floats = job.dtype == DType::f32;
  if (job.stored == DType::f32)
    floats ? activate_as<float, PanelF32::Elem>(job) : activate_as<float, PanelBf16::Elem>(job);
  else
    floats ? activate_as<uint16_t, PanelF32::Elem>(job) : activate_as<uint16_t, PanelBf16::Elem>(job);
}

template <class Elem>
void softmax_as(float* x, int rows, int n, Rows out) {
  const int padded = (n + 31) / 32 * 32;
  for (int r = 0; r < rows; ++r, x += padded) {
    for (int i = n; i < padded; ++i) x[i] = -3e38f;  // of which exp16 makes 0
    F16 most = set1(-3e38f), sum = zero();
    for (int i = 0; i < padded; i += 16) most = max(most, load(x + i));
    const F16 largest = set1(reduce_max(most));
    for (int i = 0; i < padded; i += 16) {
      const F16 e = exp16(sub(load(x + i), largest));
      store(x + i, e);
      sum = add(sum, e);
    }
    const F16 share = set1(1.0f / reduce_add(sum));
    Elem* to = reinterpret_cast<Elem*>(out.data + r * out.stride);
    for (int i = 0; i < padded; i += 16) store_act(to + i, mul(load(x + i), share));
  }
}

void softmax(float* x, int rows, int n, DType dtype, Rows out) {
  dtype == DType::f32 ? softmax_as<PanelF32::Elem>(x, rows, n, out) : softmax_as<PanelBf16::Elem>(x, rows, n, out);
}

}  // namespace
}  // namespace FASTIGPT_ISA
}  // namespace fastigpt
