// Chooses how many tokens a pass scores of each image when the caller leaves it open: as many as keep the most tokens
// per second.
#pragma once
#include <cstdint>

#include "engine/guess.h"

namespace fastigpt {

// What jobs with as many images have found out, kept from job to job.
struct WindowStatistics {
  static constexpr int kWidths = 8;
  static constexpr int width[kWidths] = {1, 2, 3, 4, 6, 8, 12, 16};
  double cost[kWidths] = {};  // of a pass, in units that all widths share; 0: not measured
  int trials[kWidths] = {};
  // Guesses of each kind, after right ones only. One kind will do where all guesses come from a draft.
  double tried[Guesser::kKinds] = {}, right[Guesser::kKinds] = {};
  double tokens = 0, spent = 0;  // kept by an image, and cost of the passes, lately
  double since[kWidths] = {};    // cost of the passes since one was to be of this width, to be timed
  // Of each least width: what an image kept, cost of the passes, and how many passes of an image that was.
  struct { double tokens = 0, spent = 0, passes = 0; } least[kWidths];
};

// One job's choice. It changes the time a job takes and never its tokens.
class WindowTuner {
 public:
  explicit WindowTuner(const WindowStatistics& statistics);
  // For the next pass: a width for all images, whose time is to be measured, or 0: width() of each image's guesses.
  int plan();
  bool trying() const { return trying_; }  // the last plan() was a width that nothing is known of
  int widest() const { return WindowStatistics::width[widest_]; }
  // kind: of the guesses that follow the first position, `places` of them; certain: these are known tokens.
  int width(const uint8_t* kind, const uint8_t* certain, int places) const;
  // A pass in which each of so many images scored `width` tokens and kept `kept`, on average. planned: all scored
  // plan()'s width.
  void passed(int images, double width, double kept, double seconds, bool planned);
  void guessed(int kind, bool right);  // a guess, if all before it in its window were right
  const WindowStatistics& statistics() const { return statistics_; }

 private:
  double cost(double width) const;
  double odds(int kind) const;
  void choose_least();
  WindowStatistics statistics_;
  double unit_ = 0;  // seconds: passes take longer as the canvas fills, all widths alike
  int widest_ = 0;
  int least_ = 0, passes_;  // the least width in use, and the passes of its stint so far
  bool trying_ = false;
};

}  // namespace fastigpt
