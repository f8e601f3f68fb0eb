// Checks how many sequences a turn takes, on machines that are made up.
#pragma once
#include <algorithm>
#include <cassert>
#include <cmath>
#include <vector>

#include "engine/turn.h"

namespace fastigpt {

// Seconds that 64 canvases of 1,000 tokens take in turns. A pass reads weights worth `weights` tokens, and keys and
// values: cheaply those that were there in the pass before, if all of the turn fit a cache of `cache` keys. sequences:
// of every turn, or 0: tuned.
inline double simulate_turns(double weights, double cache, size_t sequences) {
  constexpr int kCanvases = 64, kLength = 1000;
  TurnTuner tuner{TurnStatistics{}};
  std::vector<int> position(kCanvases, 1), served(kCanvases);
  double total = 0;
  for (int turn = 1;; ++turn) {
    std::vector<int> order;
    for (int i = 0; i < kCanvases; ++i)
      if (position[i] < kLength) order.push_back(i);
    if (order.empty()) return total;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return served[a] < served[b]; });
    std::vector<double> upto;
    for (int i : order) upto.push_back((upto.empty() ? 0 : upto.back()) + 4e3 * position[i]);  // 4 kB a key
    const size_t wanted = sequences ? std::min(sequences, order.size()) : tuner.choose(upto);
    double tokens = 0, seconds = 0;
    for (int pass = 0; seconds < 0.05 && pass < 1000; ++pass) {
      double keys = 0, live = 0;
      for (size_t k = 0; k < wanted; ++k)
        if (position[order[k]] < kLength) keys += position[order[k]]++, ++live;
      if (live == 0) break;
      tokens += live;
      seconds += 5e-5 * (weights + live + keys * (keys < cache && pass > 0 ? 1e-3 : 5e-3));
      for (size_t k = 0; k < wanted; ++k) served[order[k]] = turn;
    }
    if (!sequences) tuner.passed(tokens, seconds, true);
    total += seconds;
  }
}

inline void check_turn_tuner() {
  // Weights that cost nothing, as much as all canvases, and much more; caches for all, some and nothing of the keys.
  for (double weights : {0., 20., 200.})
    for (double cache : {1e9, 2e4, 0.}) {
      double best = INFINITY;
      for (size_t sequences : {16, 32, 64}) best = std::min(best, simulate_turns(weights, cache, sequences));
      const double tuned = simulate_turns(weights, cache, 0);
      assert(tuned <= 1.12 * best);
    }
}

}  // namespace fastigpt
