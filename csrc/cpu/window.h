// Chooses how many tokens a pass scores when the caller leaves it open: the width with the most tokens per second.
#pragma once

namespace fastigpt {

// Time of a pass at each width, measured while jobs run and kept from job to job with as many images.
struct PassCosts {
  static constexpr int kWidths = 6;
  static constexpr int width[kWidths] = {1, 2, 4, 8, 16, 32};
  double seconds[kWidths] = {};  // 0: not measured
};

// One job's choice. It changes the time a job takes and never its tokens.
class WindowTuner {
 public:
  explicit WindowTuner(const PassCosts& costs) : costs_(costs) {}
  int width();                                  // for the next pass
  void timed(int width, double seconds);        // a pass in which every image scored `width` tokens
  void guessed(int place, bool right);          // the guess at `place` ≥ 1 of a window whose guesses before it were right
  const PassCosts& costs() const { return costs_; }

 private:
  double tokens(int width) const;  // expected from a pass
  static constexpr int kPlaces = 32;
  PassCosts costs_;
  double tried_[kPlaces] = {}, right_[kPlaces] = {};
  int passes_ = 0;
};

}  // namespace fastigpt
