// The pass through all layers. Threads share out the outputs of every layer and meet after it.
#include "engine/model.h"

#include <algorithm>
#include <cstring>

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

void ModelImpl::begin(Pass& pass) const {
  for (int i = 0; i < pass.n_layer; ++i) pass.ws->tickets[i].store(0, std::memory_order_relaxed);
}

// Positions that are learned are part of the input; rotary ones come later.
void ModelImpl::embed(const Input& input, float* x) const {
  const int width = shape.width;
  if (input.dtype == DType::f32) {
    std::memcpy(x, input.embedding, width * sizeof(float));
  } else {
    for (int i = 0; i < width; ++i) {
      uint16_t half;
      std::memcpy(&half, input.embedding + i * 2, 2);
      const uint32_t bits = uint32_t(half) << 16;
      std::memcpy(x + i, &bits, 4);
    }
  }
  if (shape.positions == Positions::learned)
    for (int i = 0; i < width; ++i) x[i] += input.position[i];
  std::fill(x + width, x + round_up(width, 32), 0.0f);
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

// What a thread has computed of queries, keys and values is finished by it before the threads meet: rotary positions,
// whose pairs lie side by side and so in one panel, and the way into the caches. int8: a head's last thread has not
// seen all of it, so attention() does this.
void ModelImpl::turn_and_put(const Pass& pass, int layer, int thread) const {
  const int threads = pool.size(), panels = layers[layer].qkv.view.panels(), d = shape.head_dim;
  const int keys = shape.query_width(), values = keys + shape.key_width(), all = values + shape.key_width();
  const bool rotary = shape.positions == Positions::rotary;
  const int last = std::min(int(int64_t(panels) * (thread + 1) / threads) * kPanel, all);
  for (int column = int(int64_t(panels) * thread / threads) * kPanel, end; column < last; column = end) {
    const int section = column < keys ? 0 : column < values ? keys : values;
    const int head = (column - section) / d, start = section + head * d;
    end = std::min(last, start + d);
    const bool turned = rotary && column < values, stored = column >= keys && cache != DType::i8;
    if (!turned && !stored) continue;
    const auto put = column < values ? kernels.put_key : kernels.put_value;
    for (size_t i = 0; i < pass.stretches.size(); ++i) {
      const Stretch& s = pass.stretches[i];
      const HeadCache own = stored ? s.own->at(layer, s.lane, head) : HeadCache{};
      for (int j = 0; j < s.count; ++j) {
        const int row = pass.first_row[i] + j;
        float* x = pass.ws->qkv.as<float>() + row * pass.ws->qkv_stride + start;
        if (turned) kernels.rotate(x + column - start, pass.inputs[row].position + column - start, end - column);
        if (stored) put(cache_shape(), own, s.slot + j - s.begin, x, column - start, end - start);
      }
    }
  }
}

void ModelImpl::attention(const Pass& pass, int layer, int thread) const {
  Workspace& ws = *pass.ws;
  const int d = shape.head_dim, heads = shape.n_kv_head, group = shape.group();
  const int stretches = int(pass.stretches.size()), threads = pool.size();
  const size_t element = ws.attn_out.data ? kernels.activation_bytes(weights) : 0;
  // Heads outside, sequences inside: those that share a prefix find the head's part of it in the processor's cache.
  const int tasks = heads * stretches;
  auto keys_of = [&](int task) {
    const Stretch& s = pass.stretches[task % stretches];
    return (s.prefix ? s.prefix->at(layer, s.prefix_lane, task / stretches)
                     : s.own->at(layer, s.lane, task / stretches))
        .k;
  };
  // Queries [from, to) of a task, which has `group` of them for every token.
  auto attend = [&](int task, int from, int to, const uint8_t* next) {
    const int head = task / stretches;
    const Stretch& s = pass.stretches[task % stretches];
    const int row = pass.first_row[task % stretches], column = head * group * d;
    Attend job;
    job.shape = cache_shape();
    job.own = s.own->at(layer, s.lane, head);
    job.prefix = s.prefix ? s.prefix->at(layer, s.prefix_lane, head) : job.own;
    job.begin = s.begin;
    job.slot = s.slot;
    job.group = group;
    job.first = from;
    job.count = to - from;
    const float* rows = ws.qkv.as<float>() + row * ws.qkv_stride;
    job.q = rows + column;
    job.qkv_stride = ws.qkv_stride;
    job.out_floats = ws.attn.as<float>() ? ws.attn.as<float>() + row * ws.attn_stride + column : nullptr;
    job.out_stride = ws.attn_stride;
    job.out_rows = ws.attn_out;
    if (element) job.out_rows.data += row * ws.attn_out.stride + column * element;
    job.out_dtype = weights;
    job.scratch = ws.thread[thread].attend.as<>();
    job.next = next ? next : job.own.v;
    if (cache == DType::i8)
      for (int i = 0; i < s.count; ++i, rows += ws.qkv_stride) {
        const float* k = rows + shape.query_width() + head * d;
        kernels.put_key(job.shape, job.own, s.slot + i - s.begin, k, 0, d);
        kernels.put_value(job.shape, job.own, s.slot + i - s.begin, k + shape.key_width(), 0, d);
      }
    kernels.attend(job);
  };
  if (tasks < kFewTasks * threads && cache != DType::i8) {
    // Each thread gets as many queries as the others, counted head by head.
    const int queries = heads * group * pass.rows();
    const int first = int(int64_t(queries) * thread / threads), last = int(int64_t(queries) * (thread + 1) / threads);
    for (int task = 0, at = 0; at < last; ++task) {
      const int count = pass.stretches[task % stretches].count * group;
      if (at + count > first)
        attend(task, std::max(first - at, 0), std::min(last - at, count),
               task + 1 < tasks ? keys_of(task + 1) : nullptr);
      at += count;
    }
    return;
  }
  auto draw_ticket = [&] { return ws.tickets[layer].fetch_add(1, std::memory_order_relaxed); };
  for (int task = draw_ticket(); task < tasks; task = draw_ticket())
    attend(task, 0, pass.stretches[task % stretches].count * group,
           task + threads < tasks ? keys_of(task + threads) : nullptr);
}

void ModelImpl::run(const Pass& pass, int thread) const {
  Workspace& ws = *pass.ws;
  const int rows = pass.rows(), threads = pool.size();
  const size_t d = ws.x_stride;
  for (int r = rows * thread / threads; r < rows * (thread + 1) / threads; ++r)
    embed(pass.inputs[r], ws.x.as<float>() + r * d);
  pool.barrier();
  PHASE(-1);
  const bool i8 = weights == DType::i8;
  const LinearOut to_qkv{Sink::store, ws.qkv.as<float>(), ws.qkv_stride, {}, weights};
  const LinearOut to_x{Sink::add, ws.x.as<float>(), ws.x_stride, {}, weights};
  const Sink activation = shape.mlp == Mlp::quick_gelu ? Sink::quick_gelu : Sink::gated_silu;
  const LinearOut to_inner{activation, ws.inner.as<float>(), ws.inner_stride, ws.inner_out, weights};
  const PackedLinear& first_of_head = shape.head_inner > 0 ? head_fc : head;
  for (int i = 0; i < pass.n_layer; ++i) {
    const LayerWeights& w = layers[i];
    Rows h = norm(pass, thread, w.norm_1.as<float>(), weights);
    PHASE(0);
    linear(w.qkv, h, pass, thread, to_qkv, &w.proj);
    turn_and_put(pass, i, thread);
    pool.barrier();
    PHASE(1);
    attention(pass, i, thread);
    pool.barrier();
    PHASE(2);
    h = i8 ? quantize(pass, thread, ws.attn.as<float>(), ws.attn_stride, shape.query_width()) : ws.attn_out;
    linear(w.proj, h, pass, thread, to_x, &w.fc);
    pool.barrier();
    PHASE(3);
    h = norm(pass, thread, w.norm_2.as<float>(), weights);
    PHASE(0);
    linear(w.fc, h, pass, thread, to_inner, &w.out);
    pool.barrier();
    PHASE(4);
    h = i8 ? quantize(pass, thread, ws.inner.as<float>(), ws.inner_stride, shape.n_inner) : ws.inner_out;
    linear(w.out, h, pass, thread, to_x, i + 1 < pass.n_layer ? &layers[i + 1].qkv : &first_of_head);
    pool.barrier();
    PHASE(5);
  }
  if (pass.logits) {
    Rows h = norm(pass, thread, last_norm.as<float>(), head.view.dtype);
    if (shape.head_inner > 0) {
      linear(head_fc, h, pass, thread, {Sink::gelu, nullptr, 0, ws.head_out, head.view.dtype}, &head);
      pool.barrier();
      h = ws.head_out;
    }
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

}  // namespace fastigpt
