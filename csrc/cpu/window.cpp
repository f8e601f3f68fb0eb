// The choice: expected tokens of a width, from how often guesses at each place were right, over the time of its passes.
#include "window.h"

#include <algorithm>

namespace fastigpt {
namespace {

constexpr double kPrior = 0.7, kPriorWeight = 4;  // of a guess being right, before any was seen; wide windows must be tried
constexpr double kMemory = 0.99;                  // weight of older guesses, for each new one
constexpr double kWorthTrying = 0.9;              // a wider window is tried if the one before it reaches this share of the best rate
constexpr int kProbeEvery = 48;                   // passes after which a neighbour of the best width is timed again

}  // namespace

double WindowTuner::tokens(int width) const {
  double sum = 1, reached = 1, before = kPrior;
  for (int j = 1; j < width; ++j) {
    // A place is judged by what was seen there, and by the place before it where little was.
    before = (right_[j] + kPriorWeight * before) / (tried_[j] + kPriorWeight);
    reached *= before;
    sum += reached;
  }
  return sum;
}

int WindowTuner::width() {
  ++passes_;
  int best = 0;
  double best_rate = 0, rate[PassCosts::kWidths];
  for (int i = 0; i < PassCosts::kWidths; ++i) {
    if (costs_.seconds[i] == 0) {
      if (i == 0 || rate[i - 1] >= kWorthTrying * best_rate) return PassCosts::width[i];
      rate[i] = 0;
      continue;
    }
    rate[i] = tokens(PassCosts::width[i]) / costs_.seconds[i];
    if (rate[i] > best_rate) best_rate = rate[i], best = i;
  }
  if (passes_ % kProbeEvery == 0) {
    const int side = best + (passes_ / kProbeEvery % 2 ? 1 : -1);
    if (side >= 0 && side < PassCosts::kWidths && rate[side] > 0.6 * best_rate) return PassCosts::width[side];
  }
  return PassCosts::width[best];
}

void WindowTuner::timed(int width, double seconds) {
  for (int i = 0; i < PassCosts::kWidths; ++i) {
    if (PassCosts::width[i] != width) continue;
    double& known = costs_.seconds[i];
    // A pass that took much longer was interrupted: it counts, but not in full.
    known = known == 0 ? seconds : 0.75 * known + 0.25 * std::min(seconds, 1.5 * known);
  }
}

void WindowTuner::guessed(int place, bool right) {
  if (place >= kPlaces) return;
  tried_[place] = kMemory * tried_[place] + 1;
  right_[place] = kMemory * right_[place] + right;
}

}  // namespace fastigpt
