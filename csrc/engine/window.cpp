// The choice. Passes of a width W cost c(W) and keep Σ reach(j) tokens, where reach(j) is the chance that the guesses
// before place j are all right. An image's window grows while the tokens it adds are worth their cost at the rate of
// tokens per cost that passes have lately had, which maximises that rate (Dinkelbach, "On nonlinear fractional
// programming", 1967).
//
// That is not all a place is worth: what a pass draws there, kept or not, is the next pass's guess, and where tokens
// surprise it is a far better one (right in one of two cases, say, instead of one of ten). It shows only over some
// passes, so windows have a least width as well: neighbours of the best one are tried for a stint, as long as
// they may yet turn out better.
#include "engine/window.h"

#include <algorithm>
#include <cmath>

namespace fastigpt {
namespace {

constexpr double kPrior = 0.7, kPriorWeight = 4;  // of a guess being right, before any of its kind was seen
constexpr double kMemory = 0.999;                 // weight of older guesses, for each new one
constexpr double kRateMemory = 0.97;              // and of older passes
constexpr int kTrials = 3;                        // passes that a width gets before it is judged by the fastest of them
constexpr double kWorthTrying = 0.7;              // tokens that a further place may keep at most
constexpr double kProbeShare = 1. / 32;           // of the cost, for passes of equal widths that are timed
constexpr int kStint = 12, kSettled = 2;          // passes of a least width, and those that its predecessor spoils
constexpr double kSpread = 0.8;                   // deviation of what a pass of one image keeps, to its mean
constexpr double kLeastMemory = 0.995;            // weight of older stints, for each new one

}  // namespace

WindowTuner::WindowTuner(const WindowStatistics& statistics) : statistics_(statistics), passes_(kStint) {}

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
  if (passes_ >= kStint) choose_least();
  // All widths get as much of the cost, so that wide ones are timed seldom where they cost much.
  for (int i = 0; unit_ > 0 && i <= widest_; ++i) {
    if (statistics_.since[i] * kProbeShare <= statistics_.cost[i] * (widest_ + 1)) continue;
    statistics_.since[i] = 0;  // whatever becomes of it: known tokens may make windows wider
    return WindowStatistics::width[i];
  }
  return 0;
}

int WindowTuner::width(const uint8_t* kind, const uint8_t* certain, int places) const {
  const double rate = statistics_.spent > 0 ? statistics_.tokens / statistics_.spent : 0;
  const int most = std::min(places + 1, widest());
  const int least = std::min(most, WindowStatistics::width[std::min(least_, widest_)]);
  double reached = 1, sum = 0, best_gain = 0;
  int best = 0;
  for (int w = 1; w <= most; ++w) {
    if (w > 1 && !certain[w - 2]) reached *= odds(kind[w - 2]);
    sum += reached;
    const double gain = sum - rate * cost(w);
    if (w >= least && (best == 0 || gain > best_gain)) best_gain = gain, best = w;
  }
  return best;
}

void WindowTuner::passed(int images, double width, double kept, double seconds, bool planned) {
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
  for (double& since : statistics_.since) since += expected;
  if (++passes_ > kSettled) {
    auto& least = statistics_.least[least_];
    least.tokens += kept;
    least.spent += expected;
    least.passes += images;
  }
}

// The one that may be the best of the best so far and its neighbours (Auer, Cesa-Bianchi and Fischer, "Finite-time
// analysis of the multiarmed bandit problem", 2002).
void WindowTuner::choose_least() {
  passes_ = 0;
  auto rate = [&](int i) {
    const auto& least = statistics_.least[i];
    return least.spent > 0 ? least.tokens / least.spent : 0;
  };
  int best = 0;
  for (int i = 0; i <= widest_; ++i) {
    auto& least = statistics_.least[i];
    if (rate(i) > rate(best)) best = i;
    least.tokens *= kLeastMemory, least.spent *= kLeastMemory, least.passes *= kLeastMemory;
  }
  double most = 0;
  for (int i = std::max(0, best - 1); i <= std::min(widest_, best + 1); ++i) {
    const auto& least = statistics_.least[i];
    const double hoped = least.spent > 0 ? rate(i) * (1 + kSpread / std::sqrt(least.passes)) : INFINITY;
    if (hoped > most) most = hoped, least_ = i;
  }
}

void WindowTuner::guessed(int kind, bool right) {
  statistics_.tried[kind] = kMemory * statistics_.tried[kind] + 1;
  statistics_.right[kind] = kMemory * statistics_.right[kind] + right;
}

}  // namespace fastigpt
