// Checks of what chooses the windows of a session: the tuner of their width and the guesser of their tokens.
#pragma once
#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "engine/guess.h"
#include "engine/window.h"
#include "tests/noise.h"

using namespace fastigpt;

// A made-up machine: seconds of a pass beside those of its places, how many of these cost nothing, and how likely a
// guess is right after so many draws (three stand for more). Passes slow down towards the end of the canvas, and some
// are interrupted.
struct Machine {
  double fixed;
  int free;
  double right[4];
  double seconds(int width, int position, int pass) const {
    return (fixed + std::max(width, free)) * (1 + position / 500.0) * (pass % 37 == 5 ? 10 : 1) * 1e-6;
  }
};

// Time of a job of one image; tuner: null for the same width throughout.
static double simulate(const Machine& machine, WindowTuner* tuner, int fixed) {
  constexpr int kPositions = 1024;
  std::vector<uint8_t> draws(kPositions + 40);  // of each position, so far
  double seconds = 0;
  for (int position = 0, pass = 0; position < kPositions; ++pass) {
    const uint8_t certain[40] = {};
    const int planned = tuner ? tuner->plan() : fixed;
    const int width = planned ? planned : tuner->width(draws.data() + position, certain, 40);
    int kept = 1;
    for (bool more = true; more && kept < width; kept += more) {
      const int kind = draws[position + kept - 1];
      more = std::bernoulli_distribution(machine.right[kind])(rng);
      if (tuner) tuner->guessed(kind, more);
    }
    for (int j = 0; j < width; ++j) draws[position + j] = std::min(3, draws[position + j] + 1);
    seconds += machine.seconds(width, position, pass);
    if (tuner) tuner->passed(1, width, kept, machine.seconds(width, position, pass), planned > 0);
    position += kept;
  }
  return seconds;
}

static void check_tuner(const Machine& machine) {
  WindowStatistics statistics;
  double first = 0, later = 0, best = INFINITY;
  for (int job = 0; job < 20; ++job) {
    WindowTuner tuner(statistics);
    (job == 0 ? first : later) += simulate(machine, &tuner, 0);
    statistics = tuner.statistics();
  }
  later /= 19;
  for (int width : WindowStatistics::width) {
    double mean = 0;
    for (int job = 0; job < 20; ++job) mean += simulate(machine, nullptr, width) / 20;
    best = std::min(best, mean);
  }
  assert(first < 1.35 * best && later < 1.05 * best);
}

static void check_tuner() {
  check_tuner({4, 2, {0.8, 0.8, 0.8, 0.8}});    // 6 is best
  check_tuner({8, 1, {0.1, 0.5, 0.6, 0.7}});    // what is drawn is a better guess for the next pass: 8 or so
  check_tuner({0.8, 1, {0.1, 0.4, 0.5, 0.6}});  // places cost nearly what passes do: 1
}

static void check_guesser() {
  Guesser guesser(4);
  //                    decided         drawn    never drawn
  int32_t row[12] = {1, 2, 3, 4, 5, 6, 9, 7, 9, 0, 0, 0};
  uint8_t known[12] = {}, kinds[12];
  std::memset(kinds, 255, sizeof kinds);
  known[10] = 1;
  guesser.guess(row, known, 6, 12, 9, 9, kinds);
  const int32_t want[12] = {1, 2, 3, 4, 5, 6, 6, 7, 7, 7, 0, 0};  // 9 was wrong; position 10 is known
  assert(!std::memcmp(row, want, sizeof row));
  // What followed the same neighbours often is guessed again, whatever was drawn.
  int32_t canvas[12] = {1, 1, 1, 1, 8, 3, 1, 1, 8, 0, 0, 0};
  for (int i = 0; i < 3; ++i) guesser.learn(canvas, 5);
  uint8_t unknown[12] = {};
  canvas[4] = canvas[5] = canvas[6] = canvas[7] = 1;
  guesser.guess(canvas, unknown, 9, 10, 9, -1, kinds);
  assert(canvas[9] == 3);
  // Without rows there is only the left.
  int32_t line[3] = {5, 0, 0};
  Guesser(0).guess(line, unknown, 1, 3, 1, -1, kinds);
  for (int at : {6, 7, 8, 9, 11}) assert(kinds[at] < Guesser::kKinds);
  assert(line[1] == 5 && line[2] == 5);
}
