// Checks a decode over caches of rows, and shares its images and heads among threads.
#include "fastigpt/rows.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <vector>

#include "operators/kernels.h"
#include "runtime/helpers.h"

namespace fastigpt {
namespace {

void check(const DecodeRows& job) {
  check_dtype("q", job.dtype, {DType::f32, DType::bf16});
  check_dtype("the cache", job.stored, {DType::f32, DType::bf16, DType::i8});
  const int64_t last = job.cache.slots - job.window;
  for (int64_t b = 0; b < job.n; ++b)
    if (job.positions[b] < 0 || job.positions[b] > last)
      throw std::invalid_argument("positions must be between 0 and " + std::to_string(last) + " (" +
                                  std::to_string(job.window) + " new keys, capacity " +
                                  std::to_string(job.cache.slots) + "), not " + std::to_string(job.positions[b]));
  if (job.prefix_lengths)
    for (int64_t s = 0; s < job.prefix.rows; ++s)
      if (job.prefix_lengths[s] < 0 || job.prefix_lengths[s] > job.prefix.slots)
        throw std::invalid_argument("prefix_lengths must be between 0 and " + std::to_string(job.prefix.slots) +
                                    ", not " + std::to_string(job.prefix_lengths[s]));
}

}  // namespace

void decode_rows(const DecodeRows& job, Isa isa, int threads) {
  check(job);
  const Kernels& kernels = kernels_for(isa);
  const DType dtype = job.dtype, stored = job.stored;
  const int64_t d = job.head_dim, per_source = job.prefix.rows ? job.n / job.prefix.rows : 1;
  const auto at = [](const void* base, int64_t element, size_t bytes) {
    return base ? static_cast<const uint8_t*>(base) + element * int64_t(bytes) : nullptr;
  };
  const auto segment = [&](const StoredRows& from, int64_t row, int64_t head, int64_t slots) {
    const int64_t first = (row * job.n_head + head) * from.slots;
    return RowSegment{at(from.k, first * d, size_of(stored)), at(from.v, first * d, size_of(stored)),
                      from.k_scale ? from.k_scale + first : nullptr, from.v_scale ? from.v_scale + first : nullptr,
                      int(slots)};
  };

  int64_t most = 0, total = 0;  // keys
  for (int64_t b = 0; b < job.n; ++b) {
    const int64_t known =
        job.prefix.rows ? (job.prefix_lengths ? job.prefix_lengths[b / per_source] : job.prefix.slots) : 0;
    most = std::max(most, known + job.positions[b] + job.window);
    total += known + job.positions[b] + job.window;
  }
  // A thread is woken for four megabytes, not for less: waking takes tens of microseconds, and one core reads 30 GB/s.
  const double bytes = double(total) * job.n_head * d * 2 * size_of(stored);
  threads = int(std::max(1.0, std::min<double>({double(threads), bytes / 4e6, double(job.n * job.n_head)})));
  const int tile = int(std::min<int64_t>(job.window, kMaxRows));
  const size_t scratch = kernels.attend_rows_scratch(tile, int(most), int(d)) / sizeof(float);
  std::vector<float> floats(scratch * threads);

  const auto work = [&](int64_t b, int64_t head, float* own, const void* soon) {
    const size_t size = size_of(dtype);
    const int64_t row = b * job.window, column = head * d, start = job.positions[b];
    const int64_t slot = ((b * job.n_head + head) * job.cache.slots) + start;
    for (int64_t j = 0; j < job.window; ++j) {
      kernels.put_row(at(job.k, (row + j) * job.k_stride + column, size), dtype, int(d), job.cache.k, job.cache.k_scale,
                      slot + j, stored);
      kernels.put_row(at(job.v, (row + j) * job.v_stride + column, size), dtype, int(d), job.cache.v, job.cache.v_scale,
                      slot + j, stored);
    }
    RowSegment prefix;
    if (job.prefix.rows) {
      const int64_t source = b / per_source;
      prefix = segment(job.prefix, source, head, job.prefix_lengths ? job.prefix_lengths[source] : job.prefix.slots);
    }
    for (int64_t first = 0; first < job.window; first += tile) {
      const int64_t count = std::min<int64_t>(tile, job.window - first);
      AttendRows attend{dtype,
                        stored,
                        int(d),
                        int(count),
                        1.0f / __builtin_sqrtf(float(d)),
                        at(job.q, (row + first) * job.q_stride + column, size),
                        size_t(job.q_stride),
                        {prefix, segment(job.cache, b, head, start + first + count)},
                        const_cast<uint8_t*>(at(job.out, ((row + first) * job.n_head + head) * d, size)),
                        size_t(job.n_head * d),
                        soon,
                        own};
      kernels.attend_rows(attend);
    }
  };
  // Images of one head come one after another, so that a prefix they share stays in the processor's cache.
  std::atomic<int64_t> next{0};
  auto body = [&](int thread) {
    const int64_t tasks = job.n * job.n_head;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      const int64_t later = std::min(task + threads, tasks - 1);  // if all threads take their turn
      work(task % job.n, task / job.n, floats.data() + scratch * thread,
           segment(job.cache, later % job.n, later / job.n, 0).k);
    }
  };
  share(threads, body);
}

}  // namespace fastigpt
