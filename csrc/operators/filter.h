// Temperature, top-k, top-p and guidance: logits to scores, with the semantics of fastigpt/sampling.py.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "fastigpt/decode.h"

namespace fastigpt {

// Working memory of filter_logits for `n` tokens.
struct FilterScratch {
  explicit FilterScratch(int n) : values(n) { order.reserve(n); }
  std::vector<float> values;
  std::vector<std::pair<float, int32_t>> order;  // score, token
};

// scores[n], −inf where forbidden, and everywhere if some are not finite. without: logits without the prompt, or null.
void filter_logits(const float* logits, const float* without, int n, const DrawSettings& settings,
                   FilterScratch& scratch, float* scores);

}  // namespace fastigpt
