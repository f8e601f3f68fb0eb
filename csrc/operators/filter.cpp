// Filters on one row of logits.
#include "operators/filter.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastigpt {

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
    std::copy(scores, scores + n, scratch.values.begin());
    const auto kth = scratch.values.begin() + settings.top_k - 1;
    std::nth_element(scratch.values.begin(), kth, scratch.values.end(), std::greater<float>());
    for (int i = 0; i < n; ++i)
      if (scores[i] < *kth) scores[i] = kForbidden;
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
