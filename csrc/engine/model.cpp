// The memory of a model, and the pass through all layers.
#include "engine/model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "runtime/fork.h"

#ifdef FASTIGPT_PROFILE
#include <chrono>
#endif

namespace fastigpt {

#ifdef FASTIGPT_PROFILE
// Seconds that thread 0 spent in each phase; for profiling builds only (csrc/tests/bench_pass.cpp).
double profile_seconds[8];
static std::chrono::steady_clock::time_point profile_last;
static void profile(int phase, int thread) {
  if (thread) return;
  const auto now = std::chrono::steady_clock::now();
  if (phase >= 0) profile_seconds[phase] += std::chrono::duration<double>(now - profile_last).count();
  profile_last = now;
}
#define PHASE(number) profile(number, thread)
#else
#define PHASE(number)
#endif

KvCache::KvCache(const ModelShape& model, DType dtype, int lanes, int slots)
    : shape{dtype, model.head_dim()}, n_head(model.n_head), lanes(lanes), slots(int(round_up(slots, kKeyBlock))) {
  head_bytes = round_up(shape.head_bytes(this->slots), 64);
  memory = Buffer(head_bytes * n_head * lanes * model.n_layer);
}

Workspace::Workspace(const ModelShape& shape, const Kernels& kernels, DType weights, CacheShape cache, int rows,
                     int slots, int threads)
    : rows(rows), thread(threads), tickets(new std::atomic<int>[shape.n_layer]()) {
  const size_t d = round_up(shape.width, 32), f = round_up(shape.n_inner, 32), n = size_t(rows);
  x_stride = d;
  qkv_stride = round_up(3 * size_t(shape.width), 32);
  inner_stride = f;
  logits_stride = round_up(shape.n_tokens, 64);
  const size_t widest = std::max(d, f);
  x = Buffer(n * x_stride * 4);
  qkv = Buffer(n * qkv_stride * 4);
  logits = Buffer(n * logits_stride * 4);
  // The widest activations are float32's; the head of an int8 model reads bfloat16.
  rows_memory = Buffer(n * widest * 4);
  normed_scale = Buffer(n * 4);
  normed = {rows_memory.as<>(), widest * 4, normed_scale.as<float>()};
  if (weights == DType::i8) {
    attn = Buffer(n * d * 4);
    inner = Buffer(n * f * 4);
    attn_out = inner_out = Rows{};
  } else {
    const size_t bytes = kernels.activation_bytes(weights);
    attn_rows = Buffer(n * d * bytes);
    inner_rows = Buffer(n * f * bytes);
    attn_out = {attn_rows.as<>(), d * bytes, nullptr};
    inner_out = {inner_rows.as<>(), f * bytes, nullptr};
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
  if (weights == DType::i8 && std::max(shape.width, shape.n_inner) > 65000)
    throw std::invalid_argument("int8 layers read at most 65000 inputs: their sums are 32 bits");
  const int d = shape.width, f = shape.n_inner;
  size_t bytes = 0;
  auto shape_linear = [&](PackedLinear& p, int in, int out, DType dtype) {
    p.view.dtype = dtype;
    p.view.in = in;
    p.view.out = out;
    p.view.groups = (in + group_size(dtype) - 1) / group_size(dtype);
    p.view.data = nullptr;
    bytes += round_up(p.view.panels() * p.view.panel_bytes(), 64);
  };
  for (auto& w : layers) {
    shape_linear(w.qkv, d, 3 * d, weights);
    shape_linear(w.proj, d, d, weights);
    shape_linear(w.fc, d, f, weights);
    shape_linear(w.out, f, d, weights);
  }
  // 1/300 of the weights, and nothing after it averages its errors out: int8 models keep a bfloat16 head.
  shape_linear(head, d, shape.n_tokens, weights == DType::i8 ? DType::bf16 : weights);
  // One piece of memory, in the order a pass reads it, so that it lies in huge pages.
  linear_memory = Buffer(bytes);
  uint8_t* at = linear_memory.as<>();
  auto place = [&](PackedLinear& p) {
    p.view.data = p.data = at;
    at += round_up(p.view.panels() * p.view.panel_bytes(), 64);
  };
  for (auto& w : layers) place(w.qkv), place(w.proj), place(w.fc), place(w.out);
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

void ModelImpl::begin(Pass& pass) const {
  for (int i = 0; i < pass.n_layer; ++i) pass.ws->tickets[i].store(0, std::memory_order_relaxed);
}

Rows ModelImpl::norm(const Pass& pass, int thread, const float* gain, DType dtype) const {
  Workspace& ws = *pass.ws;
  const int rows = pass.rows(), threads = pool.size();
  const bool alone = rows <= kSmallPass;
  const Rows out = alone ? ws.thread[thread].normed : ws.normed;
  const int first = alone ? 0 : rows * thread / threads, last = alone ? rows : rows * (thread + 1) / threads;
  const float* x = ws.x.as<float>() + first * ws.x_stride;
  if (dtype == DType::i8) {
    float* floats = ws.thread[thread].floats.as<float>();
    for (int r = first; r < last; ++r, x += ws.x_stride) {
      kernels.norm_floats(x, ws.x_stride, gain, shape.epsilon, 1, shape.width, floats, ws.x_stride);
      kernels.quantize_rows(floats, ws.x_stride, 1, shape.width, out.from(r));
    }
  } else {
    kernels.norm(x, ws.x_stride, gain, shape.epsilon, last - first, shape.width, dtype, out.from(first));
  }
  if (!alone) pool.barrier();
  return out;
}

Rows ModelImpl::quantize(const Pass& pass, int thread, const float* floats, size_t stride, int width) const {
  Workspace& ws = *pass.ws;
  const int rows = pass.rows(), threads = pool.size();
  const bool alone = rows <= kSmallPass;
  const Rows out = alone ? ws.thread[thread].normed : ws.normed;
  const int first = alone ? 0 : rows * thread / threads, last = alone ? rows : rows * (thread + 1) / threads;
  kernels.quantize_rows(floats + first * stride, stride, last - first, width, out.from(first));
  if (!alone) pool.barrier();
  return out;
}

void ModelImpl::linear(const PackedLinear& layer, Rows in, const Pass& pass, int thread, const LinearOut& out,
                       const PackedLinear* next) const {
  const int threads = pool.size(), panels = layer.view.panels();
  const int first = int(int64_t(panels) * thread / threads), last = int(int64_t(panels) * (thread + 1) / threads);
  const uint8_t* after = nullptr;
  if (next)
    after = next->view.data + size_t(int64_t(next->view.panels()) * thread / threads) * next->view.panel_bytes();
  kernels.linear(layer.view, in, pass.rows(), first, last, out, after);
}

// The keys and values that this thread has computed go into the caches before the threads meet. int8: a head's last
// thread has not seen all of it, so attention() does this.
void ModelImpl::put_keys_and_values(const Pass& pass, int layer, int thread) const {
  const int threads = pool.size(), panels = layers[layer].qkv.view.panels(), d = shape.head_dim(), width = shape.width;
  const int first = int(int64_t(panels) * thread / threads) * kPanel;
  const int last = std::min(int(int64_t(panels) * (thread + 1) / threads) * kPanel, 3 * width);
  for (int column = std::max(first, width); column < last;) {
    const int head = column % width / d, start = column / width * width + head * d, end = std::min(last, start + d);
    const auto put = column < 2 * width ? kernels.put_key : kernels.put_value;
    for (size_t i = 0; i < pass.stretches.size(); ++i) {
      const Stretch& s = pass.stretches[i];
      const HeadCache cache = s.own->at(layer, s.lane, head);
      const float* from = pass.ws->qkv.as<float>() + pass.first_row[i] * pass.ws->qkv_stride + start;
      for (int j = 0; j < s.count; ++j, from += pass.ws->qkv_stride)
        put(cache_shape(), cache, s.slot + j - s.begin, from, column - start, end - start);
    }
    column = end;
  }
}

void ModelImpl::attention(const Pass& pass, int layer, int thread) const {
  Workspace& ws = *pass.ws;
  const int d = shape.head_dim(), heads = shape.n_head, stretches = int(pass.stretches.size()), threads = pool.size();
  const size_t element = ws.attn_out.data ? kernels.activation_bytes(weights) : 0;
  // Heads outside, sequences inside: those that share a prefix find the head's part of it in the processor's cache.
  const int tasks = heads * stretches;
  auto keys_of = [&](int task) {
    const Stretch& s = pass.stretches[task % stretches];
    return (s.prefix ? s.prefix->at(layer, s.prefix_lane, task / stretches)
                     : s.own->at(layer, s.lane, task / stretches))
        .k;
  };
  // Queries [from, to) of a task.
  auto attend = [&](int task, int from, int to, const uint8_t* next) {
    const int head = task / stretches;
    const Stretch& s = pass.stretches[task % stretches];
    const int row = pass.first_row[task % stretches] + from;
    Attend job;
    job.shape = cache_shape();
    job.own = s.own->at(layer, s.lane, head);
    job.prefix = s.prefix ? s.prefix->at(layer, s.prefix_lane, head) : job.own;
    job.begin = s.begin;
    job.slot = s.slot + from;
    job.count = to - from;
    job.q = ws.qkv.as<float>() + row * ws.qkv_stride + head * d;
    job.qkv_stride = ws.qkv_stride;
    job.out_floats = ws.attn.as<float>() ? ws.attn.as<float>() + row * ws.x_stride + head * d : nullptr;
    job.out_stride = ws.x_stride;
    job.out_rows = ws.attn_out;
    if (element) job.out_rows.data += row * ws.attn_out.stride + head * d * element;
    job.out_dtype = weights;
    job.scratch = ws.thread[thread].attend.as<>();
    job.next = next ? next : job.own.v;
    if (cache == DType::i8)
      for (int i = 0; i < job.count; ++i) {
        const float* q = job.q + i * ws.qkv_stride;
        kernels.put_key(job.shape, job.own, job.slot + i - job.begin, q + shape.width, 0, d);
        kernels.put_value(job.shape, job.own, job.slot + i - job.begin, q + 2 * shape.width, 0, d);
      }
    kernels.attend(job);
  };
  if (tasks < kFewTasks * threads && cache != DType::i8) {
    // Each thread gets as many queries as the others, counted head by head.
    const int queries = heads * pass.rows();
    const int first = int(int64_t(queries) * thread / threads), last = int(int64_t(queries) * (thread + 1) / threads);
    for (int task = 0, at = 0; at < last; ++task) {
      const int count = pass.stretches[task % stretches].count;
      if (at + count > first)
        attend(task, std::max(first - at, 0), std::min(last - at, count),
               task + 1 < tasks ? keys_of(task + 1) : nullptr);
      at += count;
    }
    return;
  }
  auto draw_ticket = [&] { return ws.tickets[layer].fetch_add(1, std::memory_order_relaxed); };
  for (int task = draw_ticket(); task < tasks; task = draw_ticket())
    attend(task, 0, pass.stretches[task % stretches].count, task + threads < tasks ? keys_of(task + threads) : nullptr);
}

void ModelImpl::run(const Pass& pass, int thread) const {
  Workspace& ws = *pass.ws;
  const int rows = pass.rows(), threads = pool.size();
  const size_t d = ws.x_stride;
  for (int r = rows * thread / threads; r < rows * (thread + 1) / threads; ++r) {
    float* x = ws.x.as<float>() + r * d;
    for (size_t i = 0; i < d; ++i) x[i] = pass.inputs[r].embedding[i] + pass.inputs[r].position[i];
  }
  pool.barrier();
  PHASE(-1);
  const bool i8 = weights == DType::i8;
  const LinearOut to_qkv{Sink::store, ws.qkv.as<float>(), ws.qkv_stride, {}, weights};
  const LinearOut to_x{Sink::add, ws.x.as<float>(), ws.x_stride, {}, weights};
  const LinearOut to_inner{Sink::gelu, ws.inner.as<float>(), ws.inner_stride, ws.inner_out, weights};
  for (int i = 0; i < pass.n_layer; ++i) {
    const LayerWeights& w = layers[i];
    Rows h = norm(pass, thread, w.norm_1.as<float>(), weights);
    PHASE(0);
    linear(w.qkv, h, pass, thread, to_qkv, &w.proj);
    if (cache != DType::i8) put_keys_and_values(pass, i, thread);
    pool.barrier();
    PHASE(1);
    attention(pass, i, thread);
    pool.barrier();
    PHASE(2);
    h = i8 ? quantize(pass, thread, ws.attn.as<float>(), ws.x_stride, shape.width) : ws.attn_out;
    linear(w.proj, h, pass, thread, to_x, &w.fc);
    pool.barrier();
    PHASE(3);
    h = norm(pass, thread, w.norm_2.as<float>(), weights);
    PHASE(0);
    linear(w.fc, h, pass, thread, to_inner, &w.out);
    pool.barrier();
    PHASE(4);
    h = i8 ? quantize(pass, thread, ws.inner.as<float>(), ws.inner_stride, shape.n_inner) : ws.inner_out;
    linear(w.out, h, pass, thread, to_x, i + 1 < pass.n_layer ? &layers[i + 1].qkv : &head);
    pool.barrier();
    PHASE(5);
  }
  if (pass.logits) {
    const Rows h = norm(pass, thread, last_norm.as<float>(), head.view.dtype);
    linear(head, h, pass, thread, {Sink::store, ws.logits.as<float>(), ws.logits_stride, {}, weights}, &layers[0].qkv);
    pool.barrier();
    PHASE(6);
  }
  if (pass.hidden) {
    const float* gain = pass.n_layer == shape.n_layer ? last_norm.as<float>() : layers[pass.n_layer].norm_1.as<float>();
    float* floats = ws.thread[thread].floats.as<float>();
    for (int r = rows * thread / threads; r < rows * (thread + 1) / threads; ++r) {
      kernels.norm_floats(ws.x.as<float>() + r * d, d, gain, shape.epsilon, 1, shape.width, floats, d);
      std::memcpy(pass.hidden + size_t(r) * shape.width, floats, shape.width * sizeof(float));
    }
  }
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
  return round_up(cache.head_bytes(int(round_up(slots, kKeyBlock))), 64) * s.n_head * s.n_layer;
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
