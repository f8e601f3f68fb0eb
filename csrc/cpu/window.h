// Chooses how many tokens a pass scores when the caller leaves it open: the width with the most tokens per second.
#pragma once

namespace fastigpt {

// What jobs with as many images have found out, kept from job to job.
struct WindowStatistics {
  static constexpr int kWidths = 9;
  static constexpr int width[kWidths] = {1, 2, 3, 4, 6, 8, 12, 16, 32};
  static constexpr int kPlaces = 32;
  double cost[kWidths] = {};  // of a pass, in units that all widths share; 0: not measured
  int trials[kWidths] = {};
  double tried[kPlaces] = {}, right[kPlaces] = {};  // guesses at each place of a window, after right ones only
};

// One job's choice. It changes the time a job takes and never its tokens.
class WindowTuner {
 public:
  explicit WindowTuner(const WindowStatistics& statistics) : statistics_(statistics) {}
  int width();                             // for the next pass
  void timed(int width, double seconds);   // a pass in which every image scored `width` tokens
  void guessed(int place, bool right);     // the guess at `place` ≥ 1 of a window whose guesses before it were right
  const WindowStatistics& statistics() const { return statistics_; }

 private:
  double tokens(int width) const;  // expected from a pass
  WindowStatistics statistics_;
  double unit_ = 0;  // seconds: passes take longer as the canvas fills, all widths alike
  int passes_ = 0, best_ = 0;
};

}  // namespace fastigpt
