// Norms, linear layers and rotary positions, written once for all instruction sets; see kernels.h for the layout and
// the promises.
#pragma once
#include "operators/kernels.h"
#include "operators/picture_impl.h"
#include "simd/functions.h"
#include "simd/panels.h"
#if defined(FASTIGPT_TILES)
#include "operators/tiles_impl.h"
#endif

namespace fastigpt {
namespace FASTIGPT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 12, kTileVectors = 2;  // 24 sums, 2 of the panel, 1 broadcast: 27 of 32 registers
#else
constexpr int kTileRows = 6, kTileVectors = 1;  // AVX2: 12 of 16 registers hold sums
#endif

// Raw sums of R rows × kPanel outputs, tile[r][kPanel]; integers keep their bits. The panel's groups, `groups` for each
// segment of a row, lie 128 bytes apart.
template <class P, int R>
void tile_rows(const Rows& in, const uint8_t* panel, int groups, float* tile, const uint8_t* next, size_t next_step) {
  for (int part = 0; part < 2; part += kTileVectors) {
    typename P::Acc acc[R][kTileVectors];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kTileVectors; ++c) acc[r][c] = P::none();
    const uint8_t *b = panel + part * 64, *piece = in.data;
    for (int s = 0; s < in.segments; ++s, piece += in.jump)
      for (int g = 0; g < groups; ++g, b += 128, next += next_step) {
        I16 w[kTileVectors];
        for (int c = 0; c < kTileVectors; ++c) w[c] = load(static_cast<const void*>(b + c * 64));
        prefetch(next);
        prefetch(next + 64);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const auto a =
              P::act(reinterpret_cast<const typename P::Elem*>(piece + r * in.stride) + size_t(g) * P::kGroup);
          for (int c = 0; c < kTileVectors; ++c) acc[r][c] = P::mac(acc[r][c], w[c], a);
        }
      }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kTileVectors; ++c) {
        if constexpr (P::kGroup == 4)
          store(static_cast<void*>(tile + r * kPanel + (part + c) * 16), acc[r][c]);
        else
          store(tile + r * kPanel + (part + c) * 16, acc[r][c]);
      }
  }
}

using TileFn = void (*)(const Rows&, const uint8_t*, int, float*, const uint8_t*, size_t);

template <class P>
TileFn tile_for(int rows) {
  static constexpr TileFn fns[] = {
      tile_rows<P, 1>, tile_rows<P, 2>, tile_rows<P, 3>, tile_rows<P, 4>,  tile_rows<P, 5>,  tile_rows<P, 6>,
#if defined(__AVX512F__)
      tile_rows<P, 7>, tile_rows<P, 8>, tile_rows<P, 9>, tile_rows<P, 10>, tile_rows<P, 11>, tile_rows<P, 12>,
#endif
  };
  return fns[rows - 1];
}

// Sixteen activations, from `column` on.
inline void put_activations(const LinearOut& out, int row, int column, F16 y) {
  uint8_t* to = out.rows.data + row * out.rows.stride;
  if (!out.rows.data)
    store(out.floats + row * out.stride + column, y);
  else if (out.rows_dtype == DType::f32)
    store_act(reinterpret_cast<PanelF32::Elem*>(to) + column, y);
  else
    store_act(reinterpret_cast<PanelBf16::Elem*>(to) + column, y);
}

void finish_tile(const Linear& layer, Rows in, int rows, int row0, int panel, const float* tile, const LinearOut& out) {
  const int column = panel * kPanel;
  if (out.sink == Sink::picture) return finish_picture(layer, *out.picture, rows, row0, column, tile);
  for (int r = 0; r < rows; ++r) {
    const int row = row0 + r;
    F16 y[2];
    for (int c = 0; c < 2; ++c) {
      const int at = column + c * 16;
      if (layer.dtype == DType::i8) {
        const I16 offset = shift_left<7>(load(static_cast<const void*>(layer.column_sum + at)));
        const I16 sum = subi(load(static_cast<const void*>(tile + r * kPanel + c * 16)), offset);
        y[c] = mul(to_float(sum), mul(set1(in.scale[row]), load(layer.scale + at)));
      } else {
        y[c] = load(tile + r * kPanel + c * 16);
      }
      if (layer.bias) y[c] = add(y[c], load(layer.bias + at));
    }
    if (out.sink == Sink::gated_silu) {
      put_activations(out, row, column / 2, mul(gated(y[0], 1.0f), y[1]));
      continue;
    }
    for (int c = 0; c < 2; ++c) {
      const int at = column + c * 16;
      float* to = out.floats ? out.floats + row * out.stride + at : nullptr;
      switch (out.sink) {
        case Sink::store: store(to, y[c]); break;
        case Sink::add: store(to, add(load(to), y[c])); break;
        case Sink::quick_gelu: put_activations(out, row, at, gated(y[c], 1.702f)); break;
        case Sink::gelu: put_activations(out, row, at, gelu16(y[c])); break;
        case Sink::gated_silu:
        case Sink::picture: break;
      }
    }
  }
}

template <class P>
void linear_as(const Linear& layer, Rows in, int rows, int first, int last, const LinearOut& out, const uint8_t* next) {
  alignas(64) float tile[kTileRows * kPanel];
  const int tiles = (rows + kTileRows - 1) / kTileRows, groups = layer.groups / in.segments;
  // Each tile prefetches its share of the panel after this one.
  const size_t step = tiles >= 128 ? 1 : size_t(128) / tiles;
  for (int panel = first; panel < last; ++panel) {
    const uint8_t* data = layer.data + panel * layer.panel_bytes();
    const uint8_t* after = panel + 1 < last ? data + layer.panel_bytes() : next;
    for (int i = 0; i < tiles; ++i) {
      const int row0 = int(int64_t(rows) * i / tiles), row1 = int(int64_t(rows) * (i + 1) / tiles);
      tile_for<P>(row1 - row0)(in.from(row0), data, groups, tile,
                               after ? after + size_t(i) * step * layer.groups : data, after ? step : 0);
      finish_tile(layer, in, row1 - row0, row0, panel, tile, out);
    }
  }
}

void linear(const Linear& layer, Rows in, int rows, int first, int last, const LinearOut& out, const uint8_t* next) {
#if defined(FASTIGPT_TILES)
  if (layer.dtype == DType::bf16) return linear_of_tiles<false>(layer, in, rows, first, last, out, next);
  // Integers are exact either way, and few rows are as fast or faster with vectors.
  if (layer.dtype == DType::i8 && rows > kTileRows)
    return linear_of_tiles<true>(layer, in, rows, first, last, out, next);
#endif
  if (layer.dtype == DType::f32)
    linear_as<PanelF32>(layer, in, rows, first, last, out, next);
  else if (layer.dtype == DType::bf16)
    linear_as<PanelBf16>(layer, in, rows, first, last, out, next);
  else
    linear_as<PanelI8>(layer, in, rows, first, last, out, next);
}

size_t activation_bytes(DType weights) {
  return weights == DType::f32 ? sizeof(PanelF32::Elem) : weights == DType::bf16 ? sizeof(PanelBf16::Elem) : 1;
}

inline float norm_scale(const float* x, int padded, int width, float epsilon) {
  F16 sum = zero();
  for (int i = 0; i < padded; i += 16) {
    const F16 v = load(x + i);
    sum = fma(v, v, sum);
  }
  return 1.0f / __builtin_sqrtf(reduce_add(sum) / float(width) + epsilon);
}

void quantize_row(const float* x, int padded, uint8_t* out, float* scale) {
  F16 most = zero();
  for (int i = 0; i < padded; i += 16) most = max(most, abs(load(x + i)));
  const float largest = reduce_max(most);
  *scale = largest / 127.0f;
  const F16 inverse = set1(largest > 0 ? 127.0f / largest : 0.0f);
  for (int i = 0; i < padded; i += 16) {
    const I16 q = addi(nearest(mul(load(x + i), inverse)), set1i(128));
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(q));
#else
    int32_t lanes[16];
    store(static_cast<void*>(lanes), q);
    for (int j = 0; j < 16; ++j) out[i + j] = uint8_t(lanes[j]);
#endif
  }
}

void quantize_rows(const float* x, size_t stride, int rows, int width, Rows out) {
  const int padded = (width + 31) / 32 * 32;
  for (int r = 0; r < rows; ++r) quantize_row(x + r * stride, padded, out.data + r * out.stride, out.scale + r);
}

void norm_floats(const float* x, size_t stride, const float* gain, float epsilon, int rows, int width, float* out,
                 size_t out_stride) {
  const int padded = (width + 31) / 32 * 32;
  for (int r = 0; r < rows; ++r) {
    const F16 scale = set1(norm_scale(x + r * stride, padded, width, epsilon));
    for (int i = 0; i < padded; i += 16)
      store(out + r * out_stride + i, mul(mul(load(x + r * stride + i), scale), load(gain + i)));
  }
}

void norm(const float* x, size_t stride, const float* gain, float epsilon, int rows, int width, DType dtype, Rows out) {
  const int padded = (width + 31) / 32 * 32;
  for (int r = 0; r < rows; ++r) {
    const float* row = x + r * stride;
    uint8_t* to = out.data + r * out.stride;
    const F16 scale = set1(norm_scale(row, padded, width, epsilon));
    for (int i = 0; i < padded; i += 16) {
      const F16 y = mul(mul(load(row + i), scale), load(gain + i));
      if (dtype == DType::f32)
        store_act(reinterpret_cast<PanelF32::Elem*>(to) + i, y);
      else
        store_act(reinterpret_cast<PanelBf16::Elem*>(to) + i, y);
    }
  }
}

void rotate(float* x, const float* turns, int n) {
  for (int i = 0; i < n; i += 2) {
    const float a = x[i], b = x[i + 1], cosine = turns[i], sine = turns[i + 1];
    x[i] = a * cosine - b * sine;
    x[i + 1] = b * cosine + a * sine;
  }
}

}  // namespace
}  // namespace FASTIGPT_ISA
}  // namespace fastigpt
