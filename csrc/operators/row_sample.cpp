// The sampling head on plain rows: tiles of images are shared among threads, and a tile reads the weight once.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "fastigpt/rows.h"
#include "operators/filter.h"
#include "operators/kernels.h"
#include "runtime/helpers.h"

namespace fastigpt {
namespace {

constexpr int kTile = 16;  // images

struct SampleScratch {
  SampleScratch(int64_t tile, int64_t width, int64_t colours)
      : x(tile * width), padded(tile * ((width + 31) / 32 * 32)), stride((colours + 63) / 64 * 64),
        logits(2 * tile * stride), scores(stride, -std::numeric_limits<float>::infinity()), filter(int(colours)) {}
  std::vector<float> x, padded;
  int64_t stride;
  std::vector<float> logits, scores;
  FilterScratch filter;
};

// One row, floats: x · rsqrt(mean(x²) + epsilon) · gain.
void norm_row(const void* from, DType dtype, const float* gain, float epsilon, int64_t width, float* to) {
  if (dtype == DType::f32) {
    std::memcpy(to, from, width * sizeof(float));
  } else {
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(from)[i]) << 16;
      std::memcpy(to + i, &bits, 4);
    }
  }
  float parts[16] = {};
  for (int64_t i = 0; i < width; ++i) parts[i % 16] += to[i] * to[i];
  float sum = 0;
  for (float part : parts) sum += part;
  const float scale = 1.0f / std::sqrt(sum / float(width) + epsilon);
  for (int64_t i = 0; i < width; ++i) to[i] = to[i] * scale * gain[i];
}

int pick(const Kernels& kernels, const float* scores, int n, const DrawSettings& settings, const DrawKey& key) {
  if (settings.temperature != 0) return kernels.draw(scores, n, key);
  const float* best = std::max_element(scores, scores + n);
  return std::isfinite(*best) ? int(best - scores) : -1;
}

}  // namespace

void sample_rows(const SampleRows& job, Isa isa, int threads) {
  check_dtype("hidden", job.hidden_dtype, {DType::f32, DType::bf16});
  check_dtype("weight", job.weight_dtype, {DType::f32, DType::bf16});
  for (int64_t b = 0; b < job.n; ++b)
    if (job.position[b] < 0 || job.position[b] >= int64_t(1) << 32)
      throw std::invalid_argument("position must be from 0 to " + std::to_string((int64_t(1) << 32) - 1) + ", found " +
                                  std::to_string(job.position[b]));
  const Kernels& kernels = kernels_for(isa);
  const int64_t tiles = (job.n + kTile - 1) / kTile, tile = std::min<int64_t>(job.n, kTile);
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, tiles)));
  std::vector<SampleScratch> scratch(threads, SampleScratch(tile, job.width, job.colours));
  std::atomic<int64_t> next{0};
  std::atomic<bool> finite{true};

  const auto logits = [&](const void* rows, int64_t first, int64_t count, SampleScratch& own, float* to) {
    const size_t bytes = job.width * size_of(job.hidden_dtype);
    for (int64_t i = 0; i < count; ++i)
      norm_row(static_cast<const uint8_t*>(rows) + (first + i) * bytes, job.hidden_dtype, job.gain, job.epsilon,
               job.width, own.x.data() + i * job.width);
    kernels.product_rows(job.weight, job.weight_dtype, int(job.colours), int(job.width), own.x.data(), int(count), to,
                         own.stride, own.padded.data());
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < job.colours; ++c)
        if (!std::isfinite(to[i * own.stride + c])) finite = false;
  };
  auto body = [&](int thread) {
    SampleScratch& own = scratch[thread];
    float *with = own.logits.data(), *without = with + tile * own.stride;
    for (int64_t t; finite && (t = next.fetch_add(1, std::memory_order_relaxed)) < tiles;) {
      const int64_t first = t * kTile, count = std::min<int64_t>(kTile, job.n - first);
      logits(job.hidden, first, count, own, with);
      if (job.without) logits(job.without, first, count, own, without);
      if (!finite) return;  // what follows sorts
      for (int64_t i = 0; i < count; ++i) {
        filter_logits(with + i * own.stride, job.without ? without + i * own.stride : nullptr, int(job.colours),
                      job.settings, own.filter, own.scores.data());
        const DrawKey key{job.settings.seed, uint64_t(job.index[first + i]), uint32_t(job.position[first + i])};
        job.tokens[first + i] = pick(kernels, own.scores.data(), int(job.colours), job.settings, key);
        if (job.tokens[first + i] < 0) finite = false;  // what guidance or temperature made of them is not
      }
    }
  };
  share(threads, body);
  if (!finite)
    throw std::invalid_argument("hidden, gain and weight must give finite logits, guided and divided by temperature");
}

}  // namespace fastigpt
