// Guesses the tokens of a window from the tokens around them. A guess costs a pass when it is wrong and never changes a
// token.
#pragma once
#include <cstdint>
#include <vector>

namespace fastigpt {

class Guesser {
 public:
  static constexpr int kKinds = 128;
  explicit Guesser(int columns);  // pixels in a row of the canvas; 0: not known, guesses look to the left only
  // Guesses for the unknown tokens from `first` to before `last` of `row`, which holds every token before `first`.
  // Tokens before `scored` were drawn by the last pass, after a guess `wrong` of the token before `first` (−1: it was
  // right). kind: of each guess, below kKinds; guesses of a kind are right about equally often.
  void guess(int32_t* row, const uint8_t* known, int first, int last, int scored, int wrong, uint8_t* kind) const;
  // Takes note of the token at `at`, now decided as all before it are.
  void learn(const int32_t* row, int at);

 private:
  struct Memory {
    uint16_t token;
    uint8_t trust;
  };
  int recall(const int32_t* row, int at) const;  // −1: nothing trusted
  uint32_t place(const int32_t* row, int at, bool wide) const;
  const int columns_;
  std::vector<Memory> wide_, narrow_;  // what followed the last time that these neighbours were seen
};

}  // namespace fastigpt
