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
constexpr int kActs = 4, kWeights = 6;                 // tiles 4 and 5, 6 and 7; 0 to 3 are sums, or 0 to 5
constexpr int kMostRows = 3 * kTile;                   // that go over a panel at once
constexpr int kManyRows = 192;                         // from which on they do: of fewer, weights come from memory
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

// What is left of the groups of a segment, with zeros behind it.
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
void add_tiles(TileShapes shapes, const Rows& in, const uint8_t* panel, int groups, float* tile, const uint8_t* next,
               size_t next_step) {
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
  for (int s = 0; s < in.segments; ++s, panel += groups * kPanelStride) {
    const uint8_t* piece = in.data + s * in.jump;
    int g = 0;
    for (; g + kTile <= groups; g += kTile) {
      add(piece + size_t(g) * 4, in.stride, panel + g * kPanelStride);
      prefetch_bytes(next, next_step * kTile);
    }
    if (g < groups) {
      const Tail tail(piece + size_t(g) * 4, in.stride, shapes.first + shapes.second, panel + g * kPanelStride,
                      groups - g);
      add(tail.acts[0], 64, tail.weights[0]);
    }
  }
  constexpr size_t row = kPanel * sizeof(float);
  store_tile<0>(tile, row), store_tile<1>(tile + 16, row);
  if constexpr (both) {
    tile += shapes.first * kPanel;
    store_tile<2>(tile, row), store_tile<3>(tile + 16, row);
  }
}

// Three whole blocks of rows × one panel, for many rows. Then weights are in the second-level cache, and the way from
// there to the first is what takes time: of each product, a third less goes along it than with two blocks, although two
// tiles are left for all that is read (benchmarks/results/vq.md).
template <bool bytes>
void add_three(const Rows& in, const uint8_t* panel, int groups, float* tile, const uint8_t* next, size_t next_step) {
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>(), zero_tile<4>(), zero_tile<5>();
  constexpr int kAct = 6, kWeight = 7;
  for (int s = 0; s < in.segments; ++s) {
    const uint8_t *first = in.data + s * in.jump, *second = first + kTile * in.stride,
                  *third = second + kTile * in.stride;
    for (int g = 0; g < groups; g += kTile, first += 64, second += 64, third += 64, panel += kTile * kPanelStride) {
      load_tile<kWeight>(panel, kPanelStride);
      load_tile<kAct>(first, in.stride);
      dot_tiles<bytes, 0, kAct, kWeight>();
      load_tile<kAct>(second, in.stride);
      dot_tiles<bytes, 2, kAct, kWeight>();
      load_tile<kAct>(third, in.stride);
      dot_tiles<bytes, 4, kAct, kWeight>();
      load_tile<kWeight>(panel + kHalfPanel, kPanelStride);
      dot_tiles<bytes, 5, kAct, kWeight>();
      load_tile<kAct>(second, in.stride);
      dot_tiles<bytes, 3, kAct, kWeight>();
      load_tile<kAct>(first, in.stride);
      dot_tiles<bytes, 1, kAct, kWeight>();
      prefetch_bytes(next, next_step * kTile);
    }
  }
  constexpr size_t row = kPanel * sizeof(float);
  constexpr int kBlock = kTile * kPanel;
  store_tile<0>(tile, row), store_tile<1>(tile + 16, row);
  store_tile<2>(tile + kBlock, row), store_tile<3>(tile + kBlock + 16, row);
  store_tile<4>(tile + 2 * kBlock, row), store_tile<5>(tile + 2 * kBlock + 16, row);
}

void finish_tile(const Linear& layer, Rows in, int rows, int row0, int panel, const float* tile, const LinearOut& out);

template <bool bytes>
void linear_of_tiles(const Linear& layer, Rows in, int rows, int first, int last, const LinearOut& out,
                     const uint8_t* next) {
  alignas(64) float tile[kMostRows * kPanel];
  const int groups = layer.groups / in.segments;
  const int threes = rows >= kManyRows && groups % kTile == 0 ? rows / kMostRows : 0;
  const int parts = threes + (rows - threes * kMostRows + 2 * kTile - 1) / (2 * kTile);
  const size_t step = size_t(128) / parts;  // each part prefetches its share of the panel after this one
  TileShapes loaded;
  for (int panel = first; panel < last; ++panel) {
    const uint8_t* data = layer.data + panel * layer.panel_bytes();
    const uint8_t* after = panel + 1 < last ? data + layer.panel_bytes() : next;
    for (int i = 0, row0 = 0, count; i < parts; ++i, row0 += count) {
      count = i < threes ? kMostRows : (rows - row0) / (parts - i);
      const bool both = count > kTile;
      const TileShapes shapes = i < threes ? TileShapes{kTile, kTile}
                                : both     ? TileShapes{(count + 1) / 2, count / 2}
                                           : TileShapes{count, 0};
      if (!(shapes == loaded)) shapes.load();
      loaded = shapes;
      const uint8_t* const share = after ? after + size_t(i) * step * layer.groups : data;
      const size_t share_step = after ? step : 0;
      if (i < threes)
        add_three<bytes>(in.from(row0), data, groups, tile, share, share_step);
      else
        (both ? add_tiles<bytes, true> : add_tiles<bytes, false>)(shapes, in.from(row0), data, groups, tile, share,
                                                                  share_step);
      finish_tile(layer, in, count, row0, panel, tile, out);
    }
  }
  asm volatile("tilerelease");
}

}  // namespace
}  // namespace FASTIGPT_ISA
}  // namespace fastigpt
