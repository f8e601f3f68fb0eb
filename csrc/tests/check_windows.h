// Checks of what chooses the windows of a session: the tuner of their width and the guesser of their tokens.
#pragma once
#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <random>

#include "engine/guess.h"
#include "engine/window.h"
#include "tests/noise.h"

using namespace fastigpt;

// A made-up machine on which a window of 6 is best, passes slow down towards the end of the canvas, and some are
// interrupted.
static double seconds_of(int width, int position, int pass) {
  return (4 + std::max(width, 2)) * (1 + position / 500.0) * (pass % 37 == 5 ? 10 : 1) * 1e-6;
}

// Time of a job that keeps each guess with probability 0.8; tuner: null for the same width throughout.
static double simulate(WindowTuner* tuner, int fixed) {
  std::bernoulli_distribution right(0.8);
  double seconds = 0;
  for (int position = 0, pass = 0; position < 1024; ++pass) {
    const uint8_t kinds[40] = {}, certain[40] = {};
    const int planned = tuner ? tuner->plan() : fixed, width = planned ? planned : tuner->width(kinds, certain, 40);
    int kept = 1;
    for (bool more = true; more && kept < width; kept += more) {
      more = right(rng);
      if (tuner) tuner->guessed(0, more);
    }
    seconds += seconds_of(width, position, pass);
    if (tuner) tuner->passed(width, kept, seconds_of(width, position, pass), planned > 0);
    position += kept;
  }
  return seconds;
}

static void check_tuner() {
  WindowStatistics statistics;
  double first = 0, later = 0, best = INFINITY;
  for (int job = 0; job < 20; ++job) {
    WindowTuner tuner(statistics);
    (job == 0 ? first : later) += simulate(&tuner, 0);
    statistics = tuner.statistics();
  }
  later /= 19;
  for (int width : WindowStatistics::width) {
    double mean = 0;
    for (int job = 0; job < 20; ++job) mean += simulate(nullptr, width) / 20;
    best = std::min(best, mean);
  }
  assert(first < 1.35 * best && later < 1.05 * best);
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
