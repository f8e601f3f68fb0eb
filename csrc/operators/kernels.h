// The arithmetic of one decode step, as plain functions behind a table with one entry for each instruction set.
//
// Every kernel is bitwise independent of how many rows it gets and of how rows, columns and heads are shared out: an
// output element is always the same chain of operations. Linear layers add their products in the order of the inputs,
// one chain for each output; attention runs over its keys in blocks of 16 slots counted from the start of the sequence.
//
// One layout serves linear layers, keys and values. A "panel" holds, for each group of k consecutive inputs, 16 outputs
// × k numbers = 64 bytes: k = 1 in float32, 2 in bfloat16, 4 in int8. Weights are panels of 32 outputs (two groups of
// 16 side by side); a block of 16 keys is a panel whose outputs are keys and whose inputs are the head's dimensions;
// values are a panel whose outputs are the head's dimensions and whose inputs are keys.
#pragma once
#include <cstddef>
#include <cstdint>

#include "fastigpt/dtype.h"
#include "fastigpt/isa.h"

namespace fastigpt {

constexpr int kPanel = 32;      // outputs in a panel of weights
constexpr int kKeyBlock = 16;   // keys in a block of the cache
constexpr int kMaxQueries = 8;  // queries that share one walk over the cache

constexpr int group_size(DType dtype) { return int(4 / size_of(dtype)); }  // f32, bf16 or i8

// A linear layer, packed. int8: weight = data · scale[output]; activations arrive as unsigned bytes offset by 128, and
// column_sum[output] · 128 takes the offset out again. All pointers are padded to whole panels with zeros.
struct Linear {
  DType dtype = DType::f32;
  int in = 0, out = 0;
  int groups = 0;  // inputs / group_size, rounded up
  const uint8_t* data = nullptr;
  const float* scale = nullptr;
  const int32_t* column_sum = nullptr;
  const float* bias = nullptr;  // or null
  int panels() const { return (out + kPanel - 1) / kPanel; }
  size_t panel_bytes() const { return size_t(groups) * 128; }
};

// Rows of activations in the format that the kernels for some weights read: float32, bfloat16 or bytes with a scale. A
// row may lie in `segments` pieces of one length, `jump` bytes from one to the next, and overlap its neighbours: so do
// the places that a convolution sees.
struct Rows {
  uint8_t* data = nullptr;
  size_t stride = 0;  // bytes
  float* scale = nullptr;
  int segments = 1;
  size_t jump = 0;
  Rows from(int row) const {
    return {data + size_t(row) * stride, stride, scale ? scale + row : nullptr, segments, jump};
  }
};

// What becomes of the outputs y: out = y, out += y, or what goes through an activation. quick_gelu: y · sigmoid(1.702
// y); gelu: the exact one; gated_silu: a panel holds 16 gates and then as many y, and gives 16 outputs silu(gate) · y.
// picture: see Picture.
enum class Sink { store, add, quick_gelu, gelu, gated_silu, picture };

// Rows that are the places of a picture, `line` of them for each of its rows, of which the first `width` count.
struct Picture {
  int line, width;
  DType dtype;       // f32 or bf16
  void* out;         // [outputs rounded up to whole panels] for each place
  const void* add;   // is added; lies like out, which it may be; or null
  size_t step, row;  // numbers from place to place, from row to row
  // [3][outputs rounded up], all 0 before the first rows: what the first place has, p, then the sums of y − p and of
  // (y − p)² over all places. (Sums of y and y² would lose small variances beside large means.)
  float* sums;
};

struct LinearOut {
  Sink sink;
  float* floats;     // store, add; activations when rows.data is null
  size_t stride;     // floats between rows
  Rows rows;         // else activations for the next layer
  DType rows_dtype;  // weights of the next layer
  const Picture* picture = nullptr;
};

// Places of a picture as activations: x · scale + shift by channel; silu, for which there must be both: then x ·
// sigmoid(x).
struct Activate {
  const void* x;  // [places][channels], channels a multiple of 32
  DType stored;   // f32 or bf16
  int places, channels;
  const float *scale, *shift;  // [channels], or both null: as it is
  bool silu;
  DType dtype;  // of the weights, f32 or bf16
  uint8_t* out;
};

// One head's cache in one sequence: [key blocks][groups of head_dim][16][k], [groups of keys][value_dim][k], and in
// int8 a scale for each key and each value.
struct HeadCache {
  uint8_t* k = nullptr;
  uint8_t* v = nullptr;
  float* k_scale = nullptr;
  float* v_scale = nullptr;
};

struct CacheShape {
  DType dtype = DType::bf16;
  int head_dim = 0;
  int k_groups() const { return (head_dim + group_size(dtype) - 1) / group_size(dtype); }
  int value_dim() const { return (head_dim + 15) / 16 * 16; }
  size_t k_bytes(int slots) const { return size_t(slots) / kKeyBlock * k_groups() * 64; }
  size_t v_bytes(int slots) const {
    return size_t(slots) / group_size(dtype) * value_dim() * group_size(dtype) * size_of(dtype);
  }
  size_t scale_bytes(int slots) const { return dtype == DType::i8 ? size_t(slots) * sizeof(float) : 0; }
  size_t head_bytes(int slots) const { return k_bytes(slots) + v_bytes(slots) + 2 * scale_bytes(slots); }
  HeadCache at(uint8_t* base, int slots) const {
    uint8_t* v = base + k_bytes(slots);
    uint8_t* scales = v + v_bytes(slots);
    const bool i8 = dtype == DType::i8;
    return {base, v, i8 ? reinterpret_cast<float*>(scales) : nullptr,
            i8 ? reinterpret_cast<float*>(scales + scale_bytes(slots)) : nullptr};
  }
};

// Attention of queries of one sequence over one head of keys and values, which `group` neighbouring heads of queries
// share. Query i is that of head i % group at slot + i / group; wanted are `count` of them from `first` on. Slots below
// `begin` (a multiple of 16) are read from `prefix`, the rest from `own`, whose first slot is `begin`. Their keys are
// in the cache.
struct Attend {
  CacheShape shape;
  HeadCache prefix, own;
  int begin, slot, group, first, count;
  const float* q;  // rows from `slot` on, stride qkv_stride, at the first of these heads
  size_t qkv_stride;
  float* out_floats;  // rows likewise; used when out_rows.data is null
  size_t out_stride;  // floats
  Rows out_rows;      // else as activations for weights of out_dtype, also at the first head's first element
  DType out_dtype;
  uint8_t* scratch;     // attend_scratch() bytes, 64-byte aligned
  const uint8_t* next;  // keys that the thread will read after this, to be prefetched
};

// Keys and values of one head as rows, [slot][head_dim], with a scale for each row in int8. See row_attention_impl.h.
struct RowSegment {
  const void *k = nullptr, *v = nullptr;
  const float *k_scale = nullptr, *v_scale = nullptr;
  int slots = 0;  // that are used
};

constexpr int kMaxRows = 64;  // queries of one AttendRows

// Attention of `count` consecutive queries of one head over two segments, the second of which ends with the keys of the
// queries themselves: the last query sees everything, the one before it one key less, and so on.
struct AttendRows {
  DType dtype;   // f32 or bf16: of q and out
  DType stored;  // f32, bf16 or i8: of keys and values
  int head_dim, count;
  float scale;
  const void* q;
  size_t q_stride;  // elements between rows
  RowSegment segments[2];
  void* out;
  size_t out_stride;
  const void* next;  // keys that the thread will probably read after this, to be prefetched, or null
  float* scratch;    // attend_rows_scratch() bytes
};

struct DrawKey {
  uint64_t seed, index;
  uint32_t position;
};

struct Kernels {
  Isa isa;
  // Bytes of one activation for weights of this kind.
  size_t (*activation_bytes)(DType weights);
  // out[row] = x · rsqrt(mean(x²) + epsilon) · gain, in the format of float32 or bfloat16 weights, or as floats; x is
  // padded with zeros to a multiple of 32.
  void (*norm)(const float* x, size_t stride, const float* gain, float epsilon, int rows, int width, DType dtype,
               Rows out);
  void (*norm_floats)(const float* x, size_t stride, const float* gain, float epsilon, int rows, int width, float* out,
                      size_t out_stride);
  // Quantises float rows, padded with zeros to a multiple of 32, to bytes with a scale each.
  void (*quantize_rows)(const float* x, size_t stride, int rows, int width, Rows out);
  // Panels [first, last) of a linear layer on `rows` rows. `next`: what the thread will read after, to be prefetched.
  void (*linear)(const Linear& layer, Rows in, int rows, int first, int last, const LinearOut& out,
                 const uint8_t* next);
  void (*activate)(const Activate& job);
  // e^x over its sum, for each row of n numbers, as activations with zeros behind them up to a multiple of 32. x is
  // [rows][n rounded up to a multiple of 32], and overwritten.
  void (*softmax)(float* x, int rows, int n, DType dtype, Rows out);
  // Pairs of neighbours (a, b) among n numbers x become (a c − b s, b c + a s), (c, s) being those of `turns`.
  void (*rotate)(float* x, const float* turns, int n);
  // Dimensions [first, last) of a head's key or value into slot `at` of its cache; int8: all of them, for their scale.
  void (*put_key)(CacheShape shape, const HeadCache& head, int at, const float* k, int first, int last);
  void (*put_value)(CacheShape shape, const HeadCache& head, int at, const float* v, int first, int last);
  void (*attend)(const Attend& job);
  size_t (*attend_scratch)(CacheShape shape, int slots);
  // One row of a key or value, of `d` numbers, into a cache of rows; scales: of int8.
  void (*put_row)(const void* from, DType dtype, int d, void* cache, float* scales, size_t at, DType stored);
  void (*attend_rows)(const AttendRows& job);
  size_t (*attend_rows_scratch)(int count, int keys, int head_dim);
  // out[i][j] = rows[j] · x[i] for n rows of `width` numbers, f32 or bf16, and `count` rows of floats; scratch: count
  // rows of width floats, rounded up to a multiple of 32.
  void (*product_rows)(const void* rows, DType stored, int n, int width, const float* x, int count, float* out,
                       size_t stride, float* scratch);
  // argmax over scores[v] + noise(key, v); scores are padded to a multiple of 64 with −inf. Returns −1 if all are NaN
  // or −inf.
  int (*draw)(const float* scores, int n, const DrawKey& key);
  // The 24-bit draws' Gumbel noise as draw() approximates it; for the test that bounds its error.
  void (*gumbel)(const uint32_t* bits, float* out, int n);  // n a multiple of 16
};

const Kernels& kernels_for(Isa isa);

}  // namespace fastigpt
