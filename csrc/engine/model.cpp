// The memory of a model, and whole sequences through it.
#include "engine/model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "runtime/fork.h"

namespace fastigpt {
namespace {

// The head is a few hundredths of the weights at most, and nothing after it averages its errors out: int8 models keep
// it in bfloat16.
DType head_dtype(DType weights) { return weights == DType::i8 ? DType::bf16 : weights; }

}  // namespace

KvCache::KvCache(const ModelShape& model, DType dtype, int lanes, int slots)
    : shape{dtype, model.head_dim}, n_head(model.n_kv_head), lanes(lanes), slots(int(round_up(slots, kKeyBlock))) {
  head_bytes = round_up(shape.head_bytes(this->slots), 64);
  memory = Buffer(head_bytes * n_head * lanes * model.n_layer);
}

Workspace::Workspace(const ModelShape& shape, const Kernels& kernels, DType weights, CacheShape cache, int rows,
                     int slots, int threads)
    : rows(rows), thread(threads), tickets(new std::atomic<int>[shape.n_layer]()) {
  const size_t d = round_up(shape.width, 32), q = round_up(shape.query_width(), 32), f = round_up(shape.n_inner, 32);
  const size_t n = size_t(rows);
  x_stride = d;
  qkv_stride = round_up(shape.query_width() + 2 * shape.key_width(), 32);
  attn_stride = q;
  inner_stride = f;
  logits_stride = round_up(shape.n_tokens, 64);
  const size_t widest = std::max({d, q, f});
  x = Buffer(n * x_stride * 4);
  qkv = Buffer(n * qkv_stride * 4);
  logits = Buffer(n * logits_stride * 4);
  // The widest activations are float32's; the head of an int8 model reads bfloat16.
  rows_memory = Buffer(n * widest * 4);
  normed_scale = Buffer(n * 4);
  normed = {rows_memory.as<>(), widest * 4, normed_scale.as<float>()};
  if (weights == DType::i8) {
    attn = Buffer(n * q * 4);
    inner = Buffer(n * f * 4);
    attn_out = inner_out = Rows{};
  } else {
    const size_t bytes = kernels.activation_bytes(weights);
    attn_rows = Buffer(n * q * bytes);
    inner_rows = Buffer(n * f * bytes);
    attn_out = {attn_rows.as<>(), q * bytes, nullptr};
    inner_out = {inner_rows.as<>(), f * bytes, nullptr};
  }
  if (shape.head_inner > 0) {
    const size_t stride = round_up(shape.head_inner, 32) * kernels.activation_bytes(head_dtype(weights));
    head_rows = Buffer(n * stride);
    head_out = {head_rows.as<>(), stride, nullptr};
  }
  for (auto& t : thread) {
    t.normed_memory = Buffer(kSmallPass * widest * 4);
    t.normed_scale = Buffer(kSmallPass * 4);
    t.normed = {t.normed_memory.as<>(), widest * 4, t.normed_scale.as<float>()};
    t.floats = Buffer(d * 4);
    t.attend = Buffer(kernels.attend_scratch(cache, int(round_up(slots, kKeyBlock))));
    t.scores = Buffer(2 * logits_stride * 4);
  }
}

ModelImpl::ModelImpl(const ModelShape& shape, DType weights, DType cache, Isa isa, int threads)
    : shape(shape), weights(weights), cache(cache), kernels(kernels_for(isa)), pool(threads), layers(shape.n_layer) {
  check_dtype("weights", weights, {DType::f32, DType::bf16, DType::i8});
  check_dtype("cache", cache, {DType::f32, DType::bf16, DType::i8});
  if (weights == DType::i8 && std::max({shape.width, shape.query_width(), shape.n_inner}) > 65000)
    throw std::invalid_argument("int8 layers read at most 65000 inputs: their sums are 32 bits");
  const int d = shape.width;
  size_t bytes = 0;
  auto shape_linear = [&](PackedLinear& p, int in, std::vector<int> order, DType dtype) {
    p.order = std::move(order);
    p.view.dtype = dtype;
    p.view.in = in;
    p.view.out = int(p.order.size());
    p.view.groups = (in + group_size(dtype) - 1) / group_size(dtype);
    p.view.data = nullptr;
    bytes += round_up(p.view.panels() * p.view.panel_bytes(), 64);
  };
  for (auto& w : layers) {
    shape_linear(w.qkv, d, qkv_order(shape), weights);
    shape_linear(w.proj, shape.query_width(), plain_order(d), weights);
    shape_linear(w.fc, d, fc_order(shape), weights);
    shape_linear(w.out, shape.n_inner, plain_order(d), weights);
  }
  if (shape.head_inner > 0) shape_linear(head_fc, d, plain_order(shape.head_inner), head_dtype(weights));
  shape_linear(head, shape.head_inner > 0 ? shape.head_inner : d, plain_order(shape.n_tokens), head_dtype(weights));
  // One piece of memory, in the order a pass reads it, so that it lies in huge pages.
  linear_memory = Buffer(bytes);
  uint8_t* at = linear_memory.as<>();
  auto place = [&](PackedLinear& p) {
    p.view.data = p.data = at;
    at += round_up(p.view.panels() * p.view.panel_bytes(), 64);
  };
  for (auto& w : layers) place(w.qkv), place(w.proj), place(w.fc), place(w.out);
  if (shape.head_inner > 0) place(head_fc);
  place(head);
}

WindowStatistics ModelImpl::window_statistics(int sequences) const {
  BriefLock lock;
  const auto found = statistics_.find(sequences);
  return found == statistics_.end() ? WindowStatistics{} : found->second;
}

void ModelImpl::keep_window_statistics(int sequences, const WindowStatistics& statistics) const {
  BriefLock lock;
  statistics_[sequences] = statistics;
}

TurnStatistics ModelImpl::turn_statistics() const {
  BriefLock lock;
  return turn_statistics_;
}

void ModelImpl::keep_turn_statistics(const TurnStatistics& statistics) const {
  BriefLock lock;
  turn_statistics_ = statistics;
}

// --- CpuModel ---------------------------------------------------------------------------------------------------------

CpuModel::CpuModel(const ModelShape& shape, DType weights, DType cache, Isa isa, int threads)
    : impl_(new ModelImpl(shape, weights, cache, isa, threads)) {}

CpuModel::~CpuModel() = default;

const ModelShape& CpuModel::shape() const { return impl_->shape; }
int CpuModel::threads() const { return impl_->pool.size(); }

size_t CpuModel::weight_bytes() const { return impl_->linear_memory.size(); }

size_t CpuModel::cache_bytes(int slots) const {
  const ModelShape& s = impl_->shape;
  const CacheShape cache = impl_->cache_shape();
  return round_up(cache.head_bytes(int(round_up(slots, kKeyBlock))), 64) * s.n_kv_head * s.n_layer;
}

void CpuModel::score(const int64_t* tokens, int batch, int length, const int64_t* prefix, int prefix_length, int layer,
                     float* out) const {
  constexpr int kRows = 256;  // tokens in a pass
  const ModelImpl& m = *impl_;
  const int before = prefix_length - 1, slots = before + length;  // the last of the prefix scores the first token
  const int together = std::max(1, std::min(batch, kRows / slots));
  Workspace ws(m.shape, m.kernels, m.weights, m.cache_shape(), std::min(kRows, together * slots), slots, m.pool.size());
  const KvCache kv(m.shape, m.cache, together, slots);
  const int per_row = layer < 0 ? m.shape.n_tokens : m.shape.width;
  std::vector<float> hidden(layer < 0 ? 0 : size_t(ws.rows) * m.shape.width);
  Pass pass{&ws, {}, {}, {}, layer < 0 ? m.shape.n_layer : layer, layer < 0, layer < 0 ? nullptr : hidden.data()};
  for (int first = 0; first < batch; first += together) {
    const int count = std::min(together, batch - first);
    const int chunk = ws.rows / count;
    for (int slot = 0; slot < slots; slot += chunk) {
      const int width = std::min(chunk, slots - slot);
      pass.clear();
      for (int b = 0; b < count; ++b) {
        const int64_t* row = tokens + size_t(first + b) * length;
        pass.add({&kv, b, nullptr, 0, 0, slot, width});
        for (int s = slot; s < slot + width; ++s)
          pass.inputs.push_back(s <= before ? m.prefix(prefix[size_t(first + b) * prefix_length + s], s, prefix_length)
                                            : m.token(row[s - before - 1], s - before));
      }
      m.forward(pass);
      for (int b = 0; b < count; ++b)
        for (int s = std::max(slot, before); s < slot + width; ++s) {
          const int r = b * width + s - slot;
          const float* from =
              layer < 0 ? ws.logits.as<float>() + r * ws.logits_stride : hidden.data() + size_t(r) * per_row;
          std::memcpy(out + (size_t(first + b) * length + s - before) * per_row, from, per_row * sizeof(float));
        }
    }
  }
}

}  // namespace fastigpt
