// Operators on tensors as other people keep them, in plain rows: decode attention over caches
// [image][head][slot][head_dim] and the sampling head over a weight [colours][width]. What torch.ops.fastigpt does on a
// CPU.
#pragma once
#include <cstddef>
#include <cstdint>

#include "fastigpt/decode.h"
#include "fastigpt/dtype.h"
#include "fastigpt/isa.h"

namespace fastigpt {

// Keys and values [rows][n_head][slots][head_dim]; k_scale, v_scale [rows][n_head][slots] where they are int8, else
// null.
struct StoredRows {
  void *k = nullptr, *v = nullptr;
  float *k_scale = nullptr, *v_scale = nullptr;
  int64_t rows = 0, slots = 0;
};

struct DecodeRows {
  DType dtype;                           // f32 or bf16: of q, k, v and out
  DType stored;                          // the same, or i8: of the cache and of the prefix
  const void *q, *k, *v;                 // [n · window] rows of n_head · head_dim numbers
  int64_t q_stride, k_stride, v_stride;  // elements between rows
  int64_t n, window, n_head, head_dim;
  StoredRows cache;
  const int32_t* positions;       // [n]: slot of each image's first new key
  StoredRows prefix;              // rows: sources, 0 = none; image b belongs to source b / (n / rows)
  const int32_t* prefix_lengths;  // [sources], or null: all slots
  void* out;                      // [n · window][n_head · head_dim]
};

// Appends the keys and values, then attends. Throws std::invalid_argument for another dtype, and for a position or a
// length that does not fit, before anything is written.
void decode_rows(const DecodeRows& job, Isa isa, int threads);

struct SampleRows {
  DType hidden_dtype, weight_dtype;  // f32 or bf16
  const void *hidden, *without;      // [n][width]; without: of the same images without their prompt, or null
  const float* gain;                 // [width]
  const void* weight;                // [colours][width]
  const int64_t *index, *position;   // [n]
  int64_t n, width, colours;
  float epsilon;
  DrawSettings settings;
  int64_t* tokens;  // [n]
};

// RMS norm, head, guidance, filters and the draw. Throws std::invalid_argument for another dtype, for a position
// outside [0, 2³²) and for logits that are not finite.
void sample_rows(const SampleRows& job, Isa isa, int threads);

}  // namespace fastigpt
