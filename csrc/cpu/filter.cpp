// Filters on one row of logits.
#include "filter.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace fastigpt {

void filter_logits(const float* logits, const float* without, int n, const DrawSettings& settings, FilterScratch& scratch, float* scores) {
  constexpr float kForbidden = -std::numeric_limits<float>::infinity();
  for (int i = 0; i < n; ++i) scores[i] = without ? without[i] + settings.guidance_scale * (logits[i] - without[i]) : logits[i];
  if (settings.temperature != 0 && settings.temperature != 1)
    for (int i = 0; i < n; ++i) scores[i] /= settings.temperature;
  if (settings.top_k > 0 && settings.top_k < n) {
    std::copy(scores, scores + n, scratch.values.begin());
    const auto kth = scratch.values.begin() + settings.top_k - 1;
    std::nth_element(scratch.values.begin(), kth, scratch.values.end(), std::greater<float>());
    for (int i = 0; i < n; ++i)
      if (scores[i] < *kth) scores[i] = kForbidden;
  }
  if (settings.top_p < 1) {
    std::iota(scratch.order.begin(), scratch.order.end(), 0);
    // Ascending; of equals the lower token first.
    std::sort(scratch.order.begin(), scratch.order.end(), [&](int a, int b) { return scores[a] != scores[b] ? scores[a] < scores[b] : a < b; });
    const float largest = scores[scratch.order[n - 1]];
    double sum = 0, cumulative = 0;
    for (int i = 0; i < n; ++i) sum += scratch.values[i] = std::exp(scores[i] - largest);
    const float limit = float(1.0 - settings.top_p);
    for (int i = 0; i < n - 1; ++i) {
      const int token = scratch.order[i];
      cumulative += float(scratch.values[token] / sum);
      if (!(float(cumulative) <= limit)) break;
      scores[token] = kForbidden;
    }
  }
}

}  // namespace fastigpt
