// Chooses how many sequences draw side by side for a while. A pass over all of a large batch reads the keys and values
// of every canvas from memory; over a few, pass after pass finds them in cache, but the weights are read for fewer
// tokens. Which of the two costs more depends on the model, the machine and how full the canvases are, so it is
// measured. Who draws when changes no token.
#pragma once
#include <cstddef>
#include <vector>

namespace fastigpt {

struct TurnStatistics {
  double bytes = 32 << 20;  // of keys and values that a turn goes through, or of kFewest sequences where they have more
  bool settled = false;     // neither twice nor half as many sequences were faster
  double seconds =
      0.05;  // of a turn: short, so that every canvas gets on, and long enough to read keys and values once
};

class TurnTuner {
 public:
  static constexpr size_t kFewest = 16;  // sequences of a turn, if there are as many
  explicit TurnTuner(const TurnStatistics& statistics);
  // Sequences of the next turn. upto[k]: bytes of keys and values of the first k + 1 that are waiting.
  size_t choose(const std::vector<double>& upto);
  // The turn that choose() spoke of. measured: with that many sequences, and with widths that were not merely tried
  // out.
  void passed(double tokens, double seconds, bool measured);
  const TurnStatistics& statistics() const { return statistics_; }

 private:
  struct Tally {
    double tokens = 0, seconds = 0;
    int turns = 0;
  };
  enum class Rival { none, twice, half };
  void challenge(Rival rival);
  void judge();

  TurnStatistics statistics_;
  Rival rival_ = Rival::none;
  bool possible_ = false;     // others were waiting, and twice or half as many sequences are another number
  bool rivals_turn_ = false;  // the two alternate, so that both meet the same part of the canvas
  bool all_ = false;          // the rival takes everybody
  double rival_bytes_ = 0;
  bool twice_next_ = true;
  int unchallenged_ = 0;
  Tally mine_, theirs_;
};

}  // namespace fastigpt
