// Filters on one row of logits.
#include "operators/filter.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace fastigpt {
namespace {

// The k-th largest of n numbers, none of them NaN. The upper bits of a float, with those of negative ones turned over,
// are in its order: counting them leaves few numbers to be sorted.
float kth_largest(const float* x, int n, int k, std::vector<float>& scratch) {
  constexpr int kBits = 11;
  auto bin = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return (bits & 0x80000000u ? ~bits : bits | 0x80000000u) >> (32 - kBits);
  };
  uint32_t counts[2][1 << kBits] = {};  // neighbours are often equal, and counting them twice in a row would wait
  for (int i = 0; i < n; ++i) ++counts[i % 2][bin(x[i])];
  uint32_t wanted = (1 << kBits) - 1;
  for (int count; (count = int(counts[0][wanted] + counts[1][wanted])) < k; --wanted) k -= count;
  float* end = scratch.data();
  for (int i = 0; i < n; ++i) {  // without a branch that nobody can predict
    *end = x[i];
    end += bin(x[i]) == wanted;
  }
  std::nth_element(scratch.data(), scratch.data() + k - 1, end, std::greater<float>());
  return scratch[k - 1];
}

}  // namespace

void filter_logits(const float* logits, const float* without, int n, const DrawSettings& settings,
                   FilterScratch& scratch, float* scores) {
  constexpr float kForbidden = -std::numeric_limits<float>::infinity();
  for (int i = 0; i < n; ++i)
    scores[i] = without ? without[i] + settings.guidance_scale * (logits[i] - without[i]) : logits[i];
  if (settings.temperature != 0 && settings.temperature != 1)
    for (int i = 0; i < n; ++i) scores[i] /= settings.temperature;
  // Below are sorts, which must not meet a NaN.
  bool finite = true;
  for (int i = 0; i < n; ++i) finite &= std::isfinite(scores[i]);
  if (!finite) return std::fill_n(scores, n, kForbidden), void();
  if (settings.top_k > 0 && settings.top_k < n) {
    const float least = kth_largest(scores, n, settings.top_k, scratch.values);
    for (int i = 0; i < n; ++i) scores[i] = scores[i] < least ? kForbidden : scores[i];
  }
  if (settings.top_p < 1) {
    // Those still allowed, ascending; of equals the lower token first.
    auto& order = scratch.order;
    order.clear();
    float largest = kForbidden;
    for (int i = 0; i < n; ++i) {
      if (scores[i] == kForbidden) continue;
      order.emplace_back(scores[i], i);
      largest = std::max(largest, scores[i]);
    }
    std::sort(order.begin(), order.end());
    double sum = 0, cumulative = 0;
    for (int i = 0; i < n; ++i) sum += scratch.values[i] = std::exp(scores[i] - largest);
    const float limit = float(1.0 - settings.top_p);
    for (size_t i = 0; i + 1 < order.size(); ++i) {
      const int token = order[i].second;
      cumulative += float(scratch.values[token] / sum);
      if (!(float(cumulative) <= limit)) break;
      scores[token] = kForbidden;
    }
  }
}

}  // namespace fastigpt
