// The model: its weights, caches and workspaces, and the pass that all work is made of: some tokens of some sequences,
// each at its own place, through all layers.
#pragma once
#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/turn.h"
#include "engine/weights.h"
#include "engine/window.h"
#include "fastigpt/decode.h"
#include "operators/kernels.h"
#include "runtime/buffer.h"
#include "runtime/spinning_pool.h"

namespace fastigpt {

// Keys and values of `lanes` sequences of `slots` slots (a multiple of 16), [layer][lane][head of keys].
struct KvCache {
  KvCache() = default;
  KvCache(const ModelShape& model, DType dtype, int lanes, int slots);
  HeadCache at(int layer, int lane, int head) const {
    return shape.at(memory.as<>() + ((size_t(layer) * lanes + lane) * n_head + head) * head_bytes, slots);
  }
  CacheShape shape;
  int n_head = 0, lanes = 0, slots = 0;
  size_t head_bytes = 0;
  Buffer memory;
};

// `count` consecutive tokens of one sequence, the first at `slot`. Slots below `begin` are in lane `prefix_lane` of
// `prefix`.
struct Stretch {
  const KvCache* own;
  int lane;
  const KvCache* prefix;
  int prefix_lane;
  int begin, slot, count;
};

struct Input {
  const uint8_t* embedding;  // row
  DType dtype;               // of it, f32 or bf16
  const float* position;     // row: a vector that is added, or the cosine and sine of each pair of a head
};

// Activations for up to `rows` tokens, and the scratch of each thread.
struct Workspace {
  Workspace(const ModelShape& shape, const Kernels& kernels, DType weights, CacheShape cache, int rows, int slots,
            int threads);
  int rows;
  size_t x_stride, qkv_stride, attn_stride, inner_stride, logits_stride;  // floats
  Buffer x, qkv, attn, inner, logits, rows_memory, attn_rows, inner_rows, head_rows;
  Rows normed;               // activations for the next linear layer, shared
  Rows attn_out, inner_out;  // in the format of the next layer; data null: floats, to be quantised
  Rows head_out;             // of the head's hidden layer, if it has one
  struct PerThread {
    Buffer normed_memory, normed_scale, floats, attend, scores;
    Rows normed;  // for small passes, which every thread norms for itself
  };
  Buffer normed_scale;
  std::vector<PerThread> thread;
  std::unique_ptr<std::atomic<int>[]> tickets;  // one for each layer
};

constexpr int kSmallPass = 8;  // rows up to which threads repeat the norms instead of sharing them and meeting again
constexpr int kFewTasks = 8;   // heads of sequences for each thread, below which threads share heads evenly

struct Pass {
  Workspace* ws;
  std::vector<Stretch> stretches;
  std::vector<Input> inputs;   // one for each token of the stretches, in order
  std::vector<int> first_row;  // of each stretch
  int n_layer;
  bool logits;              // then ws->logits
  float* hidden = nullptr;  // or the normed hidden states after n_layer blocks, [rows, width]

  void clear() { stretches.clear(), inputs.clear(), first_row.clear(); }
  int rows() const { return int(inputs.size()); }
  void add(const Stretch& s) { stretches.push_back(s), first_row.push_back(rows()); }
};

struct ModelImpl {
  ModelImpl(const ModelShape& shape, DType weights, DType cache, Isa isa, int threads);
  ModelShape shape;
  DType weights, cache;
  const Kernels& kernels;
  mutable SpinningPool pool;
  Table prefix_embedding, token_embedding;
  Buffer positions, last_norm;
  PackedLinear head_fc, head;
  Buffer linear_memory;
  std::vector<LayerWeights> layers;
  // Of a row of the table of positions.
  int position_width() const { return shape.positions == Positions::rotary ? shape.head_dim : shape.width; }
  const float* position(int row) const { return positions.as<float>() + size_t(row) * position_width(); }

  // Element `at` of a prefix of `length`, and the input that scores canvas position `at` ≥ 1.
  Input prefix(int64_t id, int at, int length) const {
    return {prefix_embedding.row(id), prefix_embedding.dtype, position(at + shape.prefix_length - length)};
  }
  Input token(int64_t id, int at) const {
    return {token_embedding.row(id), token_embedding.dtype, position(at + shape.prefix_length - 1)};
  }
  CacheShape cache_shape() const { return {cache, shape.head_dim}; }

  // What jobs with so many sequences have found out about windows.
  WindowStatistics window_statistics(int sequences) const;
  void keep_window_statistics(int sequences, const WindowStatistics& statistics) const;
  TurnStatistics turn_statistics() const;
  void keep_turn_statistics(const TurnStatistics& statistics) const;

  // Prepares a pass (before the threads start) and runs one thread's part of it. All threads return together.
  void begin(Pass& pass) const;
  void run(const Pass& pass, int thread) const;
  void forward(Pass& pass) const {
    begin(pass);
    pool.run([&](int thread) { run(pass, thread); });
  }

 private:
  mutable std::map<int, WindowStatistics> statistics_;  // under BriefLock, and so is the next
  mutable TurnStatistics turn_statistics_;

  void embed(const Input& input, float* x) const;
  Rows norm(const Pass& pass, int thread, const float* gain, DType dtype) const;
  Rows quantize(const Pass& pass, int thread, const float* floats, size_t stride, int width) const;
  void linear(const PackedLinear& layer, Rows in, const Pass& pass, int thread, const LinearOut& out,
              const PackedLinear* next) const;
  void turn_and_put(const Pass& pass, int layer, int thread) const;
  void attention(const Pass& pass, int layer, int thread) const;
};

inline const ModelImpl& impl_of(const CpuModel& model) { return *model.impl_; }

}  // namespace fastigpt
