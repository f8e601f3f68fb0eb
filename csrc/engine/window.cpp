// The choice. Passes of a width W cost c(W) and keep Σ reach(j) tokens, where reach(j) is the chance that the guesses
// before place j are all right. An image's window grows while the tokens it adds are worth their cost at the rate of
// tokens per cost that passes have lately had, which maximises that rate (Dinkelbach, "On nonlinear fractional
// programming", 1967).
#include "engine/window.h"

#include <algorithm>

namespace fastigpt {
namespace {

constexpr double kPrior = 0.7, kPriorWeight = 4;  // of a guess being right, before any of its kind was seen
constexpr double kMemory = 0.999;                 // weight of older guesses, for each new one
constexpr double kRateMemory = 0.97;              // and of older passes
constexpr int kTrials = 3;                        // passes that a width gets before it is judged by the fastest of them
constexpr double kWorthTrying = 0.7;              // tokens that a further place may keep at most
constexpr int kProbeEvery = 32;                   // passes after which one is of equal widths, to be timed

}  // namespace

double WindowTuner::odds(int kind) const {
  return (statistics_.right[kind] + kPriorWeight * kPrior) / (statistics_.tried[kind] + kPriorWeight);
}

double WindowTuner::cost(double width) const {
  int i = 1;
  while (i < widest_ && WindowStatistics::width[i] < width) ++i;
  if (widest_ == 0) return statistics_.cost[0];
  const double a = WindowStatistics::width[i - 1], b = WindowStatistics::width[i];
  return statistics_.cost[i - 1] + (statistics_.cost[i] - statistics_.cost[i - 1]) * (width - a) / (b - a);
}

int WindowTuner::plan() {
  ++passes_;
  // Wider windows are tried until even good guesses cost more than tokens do at best.
  double best = 0;
  trying_ = true;
  for (int i = 0; i < WindowStatistics::kWidths; ++i) {
    if (statistics_.trials[i] < kTrials) return WindowStatistics::width[i];
    widest_ = i;
    if (i > 0) {
      const int places = WindowStatistics::width[i] - WindowStatistics::width[i - 1];
      const double more = (statistics_.cost[i] - statistics_.cost[i - 1]) / places;
      if (more > 0 && kWorthTrying / more < best) break;
    }
    double reached = 1, sum = 1;
    for (int j = 1; j < WindowStatistics::width[i]; ++j) sum += reached *= kPrior;
    best = std::max(best, sum / statistics_.cost[i]);
  }
  trying_ = false;
  if (unit_ > 0 && passes_ % kProbeEvery == 0) return WindowStatistics::width[passes_ / kProbeEvery % (widest_ + 1)];
  return 0;
}

int WindowTuner::width(const uint8_t* kind, const uint8_t* certain, int places) const {
  const double rate = statistics_.spent > 0 ? statistics_.tokens / statistics_.spent : 0;
  const int most = std::min(places + 1, widest());
  double reached = 1, sum = 1, best_gain = sum - rate * cost(1);
  int best = 1;
  for (int w = 2; w <= most; ++w) {
    if (!certain[w - 2]) reached *= odds(kind[w - 2]);
    sum += reached;
    const double gain = sum - rate * cost(w);
    if (gain > best_gain) best_gain = gain, best = w;
  }
  return best;
}

void WindowTuner::passed(double width, double kept, double seconds, bool planned) {
  if (planned) {
    for (int i = 0; i < WindowStatistics::kWidths; ++i) {
      if (WindowStatistics::width[i] != width) continue;
      double& cost = statistics_.cost[i];
      int& trials = statistics_.trials[i];
      // The first widths are tried at one place of the canvas: seconds are the unit there.
      const double now = unit_ > 0 ? seconds / unit_ : seconds;
      if (trials < kTrials)
        cost = trials++ ? std::min(cost, now) : now;
      else if (unit_ > 0)  // a pass that took much longer was interrupted: it counts, but not in full
        cost = 0.8 * cost + 0.2 * std::min(now, 1.5 * cost);
    }
    return;
  }
  const double expected = cost(width), now = seconds / expected;
  unit_ = unit_ > 0 ? 0.8 * unit_ + 0.2 * std::min(now, 1.5 * unit_) : now;
  statistics_.tokens = kRateMemory * statistics_.tokens + kept;
  statistics_.spent = kRateMemory * statistics_.spent + expected;
}

void WindowTuner::guessed(int kind, bool right) {
  statistics_.tried[kind] = kMemory * statistics_.tried[kind] + 1;
  statistics_.right[kind] = kMemory * statistics_.right[kind] + right;
}

}  // namespace fastigpt
