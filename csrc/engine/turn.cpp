#include "engine/turn.h"

#include <algorithm>

namespace fastigpt {
namespace {

constexpr int kTurns = 3;            // of each of two numbers of sequences, before they are compared
constexpr double kBetter = 1.03;     // times as fast, to be worth a change
constexpr int kChallengeEvery = 24;  // turns: canvases fill and machines change
constexpr double kAllowance = 4;     // times the bytes of everybody, once that was best

}  // namespace

TurnTuner::TurnTuner(const TurnStatistics& statistics) : statistics_(statistics) {
  if (!statistics_.settled) challenge(Rival::twice);
}

void TurnTuner::challenge(Rival rival) {
  rival_ = rival;
  rivals_turn_ = false;
  rival_bytes_ = 0;
  mine_ = theirs_ = Tally{};
  unchallenged_ = 0;
}

size_t TurnTuner::choose(const std::vector<double>& upto) {
  const size_t all = upto.size(), fewest = std::min(all, kFewest);
  const size_t best =
      std::max(fewest, size_t(std::upper_bound(upto.begin(), upto.end(), statistics_.bytes) - upto.begin()));
  if (rival_ == Rival::none) {
    possible_ = fewest < all;
    return best;
  }
  const size_t other = rival_ == Rival::twice ? std::min(all, 2 * best) : std::max(fewest, best / 2);
  possible_ = other != best;
  if (!possible_ || !rivals_turn_) return best;
  rival_bytes_ = upto[other - 1];
  all_ = other == all;
  return other;
}

void TurnTuner::passed(double tokens, double seconds, bool measured) {
  if (!possible_) {
    // Nothing is known before there are enough canvases; later, the other direction is the one to look at.
    if (rival_ == Rival::half) {
      statistics_.settled = true;
      challenge(Rival::none);
    } else if (statistics_.settled) {
      challenge(Rival::half);
    }
    return;
  }
  if (rival_ == Rival::none) {
    if (++unchallenged_ < kChallengeEvery) return;
    challenge(twice_next_ ? Rival::twice : Rival::half);
    twice_next_ = !twice_next_;
    return;
  }
  if (!measured) return;  // once more
  Tally& tally = rivals_turn_ ? theirs_ : mine_;
  tally.tokens += tokens;
  tally.seconds += seconds;
  ++tally.turns;
  rivals_turn_ = !rivals_turn_;
  if (mine_.turns >= kTurns && theirs_.turns >= kTurns) judge();
}

// On in the direction that was better; at first, upwards and then downwards.
void TurnTuner::judge() {
  if (theirs_.tokens * mine_.seconds > kBetter * mine_.tokens * theirs_.seconds) {
    statistics_.bytes = all_ ? kAllowance * rival_bytes_ : rival_bytes_;
    statistics_.settled |= all_;
    return challenge(all_ ? Rival::none : rival_);
  }
  const bool look_down = rival_ == Rival::twice && !statistics_.settled;
  statistics_.settled = true;
  challenge(look_down ? Rival::half : Rival::none);
}

}  // namespace fastigpt
