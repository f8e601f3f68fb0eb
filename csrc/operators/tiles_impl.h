// Linear layers on Intel's matrix unit (AMX): bfloat16 and int8 products of tiles, 16 rows × 64 bytes each.
//
// A tile of weights is sixteen groups of half a panel as they lie in memory, a tile of activations as many groups of up
// to sixteen rows. An output adds its products sixteen groups at a time, whatever rows are beside it: bfloat16 in an
// order of the unit's own, so that every number of rows goes this way, and int8 exactly.
//
// The instructions are written out: the compilers' own functions do not say that tiles are read from memory.
#pragma once
#include <cstring>

#include "operators/kernels.h"
#include "simd/vectors.h"

namespace fastigpt {
namespace FASTIGPT_ISA {
namespace {

constexpr int kTile = 16;                              // rows of a tile, and groups of a tile of activations
constexpr int kActs = 4, kWeights = 6;                 // tiles 4 and 5, 6 and 7; 0 to 3 are sums
constexpr size_t kPanelStride = 128, kHalfPanel = 64;  // bytes between groups of a panel, and of a group of its half

template <int tile>
inline void load_tile(const void* at, size_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(at), "r"(stride) : "memory");
}
template <int tile>
inline void store_tile(void* at, size_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(at), "r"(stride) : "memory");
}
template <int tile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <bool bytes, int sum, int act, int weight>
inline void dot_tiles() {
  if constexpr (bytes)
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(act), "i"(weight));
  else
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(act), "i"(weight));
}

// How many rows tiles have: the sums and activations of the first and of the second block of rows, if there is one.
struct TileShapes {
  int first = 0, second = 0;

  void load() const {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      const bool other = tile == 2 || tile == 3 || tile == kActs + 1;
      config.rows[tile] = uint8_t(tile >= kWeights ? kTile : other ? second : first);
      config.row_bytes[tile] = config.rows[tile] ? 64 : 0;
    }
    asm volatile("ldtilecfg (%0)" ::"r"(&config) : "memory");
  }
  bool operator==(const TileShapes& o) const { return first == o.first && second == o.second; }
};

// What is left of the groups, with zeros behind it.
struct Tail {
  alignas(64) uint8_t acts[2 * kTile][64];
  alignas(64) uint8_t weights[kTile][kPanelStride];

  Tail(const uint8_t* in, size_t stride, int rows, const uint8_t* panel, int groups) {
    std::memset(acts, 0, sizeof acts);
    std::memset(weights, 0, sizeof weights);
    for (int r = 0; r < rows; ++r) std::memcpy(acts[r], in + r * stride, size_t(groups) * 4);
    std::memcpy(weights, panel, groups * kPanelStride);
  }
};

inline void prefetch_bytes(const uint8_t*& next, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) prefetch(next + i);
  next += bytes;
}

// Raw sums of one block of rows, or of both, × one panel, tile[row][kPanel]. (Two panels at a time for one block would
// be as many chains of sums as for two, and are slower: weights come from two places.)
template <bool bytes, bool both>
void add_tiles(TileShapes shapes, const uint8_t* in, size_t stride, const uint8_t* panel, int groups, float* tile,
               const uint8_t* next, size_t next_step) {
  zero_tile<0>(), zero_tile<1>();
  if constexpr (both) zero_tile<2>(), zero_tile<3>();
  auto add = [&](const uint8_t* acts, size_t act_stride, const uint8_t* weights) {
    load_tile<kActs>(acts, act_stride);
    load_tile<kWeights>(weights, kPanelStride);
    dot_tiles<bytes, 0, kActs, kWeights>();
    load_tile<kWeights + 1>(weights + kHalfPanel, kPanelStride);
    dot_tiles<bytes, 1, kActs, kWeights + 1>();
    if constexpr (both) {
      load_tile<kActs + 1>(acts + shapes.first * act_stride, act_stride);
      dot_tiles<bytes, 2, kActs + 1, kWeights>();
      dot_tiles<bytes, 3, kActs + 1, kWeights + 1>();
    }
  };
  int g = 0;
  for (; g + kTile <= groups; g += kTile) {
    add(in + size_t(g) * 4, stride, panel + g * kPanelStride);
    prefetch_bytes(next, next_step * kTile);
  }
  if (g < groups) {
    const Tail tail(in + size_t(g) * 4, stride, shapes.first + shapes.second, panel + g * kPanelStride, groups - g);
    add(tail.acts[0], 64, tail.weights[0]);
  }
  constexpr size_t row = kPanel * sizeof(float);
  store_tile<0>(tile, row), store_tile<1>(tile + 16, row);
  if constexpr (both) {
    tile += shapes.first * kPanel;
    store_tile<2>(tile, row), store_tile<3>(tile + 16, row);
  }
}

void finish_tile(const Linear& layer, Rows in, int rows, int row0, int panel, const float* tile, const LinearOut& out);

template <bool bytes>
void linear_of_tiles(const Linear& layer, Rows in, int rows, int first, int last, const LinearOut& out,
                     const uint8_t* next) {
  alignas(64) float tile[2 * kTile * kPanel];
  const bool both = rows > kTile;
  const int parts = (rows + 2 * kTile - 1) / (2 * kTile);
  const auto work = both ? add_tiles<bytes, true> : add_tiles<bytes, false>;
  const size_t step = size_t(128) / parts;  // each part prefetches its share of the panel after this one
  TileShapes loaded;
  for (int panel = first; panel < last; ++panel) {
    const uint8_t* data = layer.data + panel * layer.panel_bytes();
    const uint8_t* after = panel + 1 < last ? data + layer.panel_bytes() : next;
    for (int i = 0; i < parts; ++i) {
      const int row0 = int(int64_t(rows) * i / parts), count = int(int64_t(rows) * (i + 1) / parts) - row0;
      const TileShapes shapes = both ? TileShapes{(count + 1) / 2, count / 2} : TileShapes{count, 0};
      if (!(shapes == loaded)) shapes.load();
      loaded = shapes;
      work(shapes, in.data + row0 * in.stride, in.stride, data, layer.groups, tile,
           after ? after + size_t(i) * step * layer.groups : data, after ? step : 0);
      finish_tile(layer, in, count, row0, panel, tile, out);
    }
  }
  asm volatile("tilerelease");
}

}  // namespace
}  // namespace FASTIGPT_ISA
}  // namespace fastigpt
