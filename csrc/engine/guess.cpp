// The rules were chosen by benchmarks/guessers.py; benchmarks/results/windows.md has the figures.
#include "engine/guess.h"

#include <algorithm>

namespace fastigpt {
namespace {

constexpr int kBits = 16;
constexpr uint8_t kTrusted = 2, kMostTrust = 7;
constexpr int kOrigins[3][3] = {{0, 1, 2}, {3, 4, 5}, {6, 7, 5}};  // rare ones together

}  // namespace

Guesser::Guesser(int columns) : columns_(columns), wide_(columns ? 1 << kBits : 0), narrow_(wide_) {}

// Hash of the tokens to the left and above, and in `wide` above to the right. At the edges of the canvas these are
// tokens of its other edge or none, which is as good a context as any.
uint32_t Guesser::place(const int32_t* row, int at, bool wide) const {
  auto token = [&](int back) { return uint32_t(at >= back ? row[at - back] + 1 : 0); };
  uint32_t h = token(1) * 0x9E3779B1u;
  h = (h ^ h >> 15 ^ token(columns_)) * 0x85EBCA77u;
  if (wide) h = (h ^ h >> 13 ^ token(columns_ - 1)) * 0xC2B2AE3Du;
  return (h ^ h >> 16) * 0x27D4EB2Fu >> (32 - kBits);
}

int Guesser::recall(const int32_t* row, int at) const {
  if (!columns_) return -1;
  const Memory& wide = wide_[place(row, at, true)];
  if (wide.trust >= kTrusted) return wide.token;
  const Memory& narrow = narrow_[place(row, at, false)];
  return narrow.trust >= kTrusted ? narrow.token : -1;
}

void Guesser::learn(const int32_t* row, int at) {
  if (!columns_) return;
  for (Memory* memory : {&wide_[place(row, at, true)], &narrow_[place(row, at, false)]}) {
    if (memory->token == row[at])
      memory->trust = std::min<uint8_t>(memory->trust + 1, kMostTrust);
    else if (memory->trust > 0)
      memory->trust /= 2;
    else
      *memory = {uint16_t(row[at]), 1};
  }
}

void Guesser::guess(int32_t* row, const uint8_t* known, int first, int last, int scored, int wrong,
                    uint8_t* kind) const {
  for (int at = first; at < last; ++at) {
    if (known[at]) continue;
    const int left = at > 0 ? row[at - 1] : 0;
    const int remembered = recall(row, at);
    // A draw made after a wrong token often repeats that token; what it meant is "the same again".
    const int origin = at >= scored ? 0 : row[at] == wrong ? 1 : 2;
    const int plain = origin == 2 ? row[at] : left;
    row[at] = remembered >= 0 ? remembered : plain;
    const int agreement = remembered < 0 ? 0 : remembered == plain ? 1 : 2;
    const bool rows = columns_ && at > columns_;
    const int above = rows ? row[at - columns_] : -1, above_left = rows ? row[at - columns_ - 1] : -2;
    kind[at] = uint8_t((at == first) | (row[at] == left) << 1 | (row[at] == above) << 2 | (above == above_left) << 3 |
                       kOrigins[origin][agreement] << 4);
  }
}

}  // namespace fastigpt
