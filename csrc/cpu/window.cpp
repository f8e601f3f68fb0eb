// The choice: expected tokens of a width, from how often guesses at each place were right, over the cost of its passes.
#include "window.h"

#include <algorithm>

namespace fastigpt {
namespace {

constexpr double kPrior = 0.7, kPriorWeight = 4;  // of a guess being right, before any was seen; wide windows must be tried
constexpr double kMemory = 0.99;                  // weight of older guesses, for each new one
constexpr int kTrials = 3;                        // passes that a width gets before it is judged by the fastest of them
constexpr double kWorthTrying = 0.85;             // a wider window is tried if the one before it reaches this share of the best rate
constexpr int kProbeEvery = 24;                   // passes after which a neighbour of the best width is timed again

}  // namespace

double WindowTuner::tokens(int width) const {
  double sum = 1, reached = 1, before = kPrior;
  for (int j = 1; j < width; ++j) {
    // A place is judged by what was seen there, and by the place before it where little was.
    before = (statistics_.right[j] + kPriorWeight * before) / (statistics_.tried[j] + kPriorWeight);
    reached *= before;
    sum += reached;
  }
  return sum;
}

int WindowTuner::width() {
  ++passes_;
  double best_rate = 0, rate[WindowStatistics::kWidths];
  for (int i = 0; i < WindowStatistics::kWidths; ++i) {
    if (statistics_.trials[i] < kTrials) {
      if (i == 0 || rate[i - 1] >= kWorthTrying * best_rate) return WindowStatistics::width[i];
      rate[i] = 0;
      continue;
    }
    rate[i] = tokens(WindowStatistics::width[i]) / statistics_.cost[i];
    if (rate[i] > best_rate) best_rate = rate[i], best_ = i;
  }
  if (unit_ > 0 && passes_ % kProbeEvery == 0) {
    const int side = best_ + (passes_ / kProbeEvery % 2 ? 1 : -1);
    if (side >= 0 && side < WindowStatistics::kWidths && rate[side] > 0.6 * best_rate) return WindowStatistics::width[side];
  }
  return WindowStatistics::width[best_];
}

void WindowTuner::timed(int width, double seconds) {
  for (int i = 0; i < WindowStatistics::kWidths; ++i) {
    if (WindowStatistics::width[i] != width) continue;
    double& cost = statistics_.cost[i];
    int& trials = statistics_.trials[i];
    if (trials < kTrials) {
      // The first widths are tried at one place of the canvas: seconds are the unit there.
      const double now = unit_ > 0 ? seconds / unit_ : seconds;
      cost = trials ? std::min(cost, now) : now;
      ++trials;
    } else if (i == best_) {
      // A pass that took much longer was interrupted: it counts, but not in full.
      unit_ = unit_ > 0 ? 0.8 * unit_ + 0.2 * std::min(seconds / cost, 1.5 * unit_) : seconds / cost;
    } else if (unit_ > 0) {
      cost = 0.8 * cost + 0.2 * std::min(seconds / unit_, 1.5 * cost);
    }
  }
}

void WindowTuner::guessed(int place, bool right) {
  if (place >= WindowStatistics::kPlaces) return;
  statistics_.tried[place] = kMemory * statistics_.tried[place] + 1;
  statistics_.right[place] = kMemory * statistics_.right[place] + right;
}

}  // namespace fastigpt
