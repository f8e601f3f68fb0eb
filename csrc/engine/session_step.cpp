// Passes of a session: each scores a window of every canvas that has something to draw.
//
// A window is the last decided token followed by guesses. The noise of every position is fixed, so the token drawn
// there is a function of the tokens before it: the draws up to the first wrong guess are those of one token at a time
// (Wiggers and Hoogeboom, "Predictive sampling with forecasting autoregressive models", 2020; Song et al.,
// "Accelerating feedforward computation via parallel nonlinear equation solving", 2021). Draws after a wrong guess
// become the next guesses, corrected; see guess.h.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "engine/session.h"

namespace fastigpt {
namespace {

constexpr uint8_t kNone[kWidestChoice] = {};
constexpr float kForbidden = -std::numeric_limits<float>::infinity();
using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

int argmax(const float* scores, int n) {
  int best = -1;
  for (int v = 0; v < n; ++v)
    if (scores[v] > kForbidden && (best < 0 || scores[v] > scores[best])) best = v;
  return best;
}

// Of what is not finite, all bits of the exponent are set. Integers have a maximum that compilers vectorise.
bool all_finite(const float* x, int n) {
  uint32_t largest = 0;
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  return largest < 0x7f800000u;
}

double log_probability(const float* logits, int n, int64_t token) {
  const double largest = *std::max_element(logits, logits + n);
  double sum = 0;
  for (int v = 0; v < n; ++v) sum += std::exp(logits[v] - largest);
  return logits[token] - largest - std::log(sum);
}

}  // namespace

// Row j of a canvas's window: the token that is drawn there, or the one that is known and, if wanted, its
// log-likelihood.
void SessionImpl::draw_row(const Slot& slot, int which, int j, FilterScratch& filter, float* scores) {
  const int n = model.shape.n_tokens, position = slot.position + j;
  const float* logits = ws.logits.as<float>() + (slot.row + j) * ws.logits_stride;
  const float* without = slot.sequences == 2 ? logits + slot.width * ws.logits_stride : nullptr;
  int& token = drawn[slot.row + j];
  token = -1;
  if (!all_finite(logits, n) || (without && !all_finite(without, n))) return;
  if (known(which, position)) {
    token = int(tokens_of(which)[position]);
    if (!slot.score) return;
    DrawSettings plain;
    plain.guided = slot.settings.guided;
    plain.guidance_scale = slot.settings.guidance_scale;
    filter_logits(logits, without, n, plain, filter, scores);
    nats[slot.row + j] = log_probability(scores, n, token);
    return;
  }
  filter_logits(logits, without, n, slot.settings, filter, scores);
  std::fill(scores + n, scores + ws.logits_stride, kForbidden);
  token = slot.settings.temperature == 0
              ? argmax(scores, n)
              : model.kernels.draw(scores, n, {slot.settings.seed, slot.index, uint32_t(position)});
}

// One pass over some canvases, whose widths and guesses are set.
void SessionImpl::pass(const int* which, int count, WindowTuner* tuner) {
  decode.clear();
  draws.clear();
  for (int k = 0; k < count; ++k) {
    Slot& slot = slots[which[k]];
    const int64_t* row = tokens_of(which[k]);
    const int32_t* guessed = guesses_of(which[k]);
    slot.row = decode.rows();
    for (int s = 0; s < slot.sequences; ++s) {
      const Sequence& sequence = slot.sequence[s];
      decode.add({&cache_of(s), which[k], sequence.shared ? &sequence.shared->cache : nullptr, 0, sequence.begin,
                  sequence.offset() + slot.position, slot.width});
      const int length = int(sequence.prefix.size());
      for (int j = 0; j < slot.width; ++j) {
        const int at = slot.position + j;  // this input scores the token `at`
        decode.inputs.push_back(at == 0 ? model.prefix(sequence.prefix[length - 1], length - 1, length)
                                        : model.token(j == 0 ? row[at - 1] : guessed[at - 1], at));
      }
    }
    for (int j = 0; j < slot.width; ++j) draws.emplace_back(which[k], j);
  }
  model.begin(decode);
  ticket.store(0, std::memory_order_relaxed);
  model.pool.run([&](int thread) {
    model.run(decode, thread);
    float* scores = ws.thread[thread].scores.as<float>();
    for (int task; (task = ticket.fetch_add(1, std::memory_order_relaxed)) < int(draws.size());) {
      const auto [i, j] = draws[task];
      draw_row(slots[i], i, j, filters[thread], scores);
    }
  });
  bool sound = true;
  for (int k = 0; k < count; ++k) sound &= decide(which[k], tuner);
  if (!sound) throw std::runtime_error("the model's logits are not finite numbers");
}

// Keeps the draws up to and including the first that was guessed wrong. Logits behind a wrong guess may be what they
// like, and its keys and values may spoil those before it in their block: only in a window of one must they be finite.
// Returns whether they were.
bool SessionImpl::decide(int which, WindowTuner* tuner) {
  Slot& slot = slots[which];
  int64_t* row = tokens_of(which);
  int32_t* guessed = guesses_of(which);
  const size_t start = size_t(which) * n_positions;
  pass_starts[start + slot.position] = 1;
  int keeping = 0;
  bool right = true, sound = true, finite = true;
  for (int j = 0; j < slot.width; ++j) {
    const int at = slot.position + j;
    const bool was_known = known(which, at);
    if (drawn[slot.row + j] < 0) {
      finite = false;
      if (right && slot.width == 1) sound = false;
      right = false;
      guessed[at] = was_known ? int32_t(row[at]) : j > 0 ? guessed[at - 1] : 0;
      continue;
    }
    const int token = was_known ? int(row[at]) : drawn[slot.row + j];
    const int guess = guessed[at];
    guessed[at] = token;
    if (!right) continue;
    row[at] = token;
    ++keeping;
    if (was_known && slot.score) slot.log_likelihood += nats[slot.row + j];
    guesser.learn(guessed, at);
    right = guess == token;
    slot.wrong = right ? -1 : guess;
    if (tuner && j + 1 < slot.width && !was_known) tuner->guessed(kinds[start + at], right);
  }
  const int scored = slot.position + slot.width;
  slot.scored = scored;
  slot.position += keeping;
  kept += keeping;
  slot.proved |= keeping > 0;
  slot.careful = !finite;
  if (!finite) clear(which, slot.position, scored);
  return sound;
}

// Keys and values of the inputs at canvas positions [from, until): what is not finite there would spoil, times a weight
// of zero, whoever comes to stand before it.
void SessionImpl::clear(int which, int from, int until) {
  const Slot& slot = slots[which];
  const std::vector<float> zero(model.shape.head_dim);
  for (int s = 0; s < slot.sequences; ++s) {
    const Sequence& sequence = slot.sequence[s];
    for (int at = std::max(sequence.offset() + from, sequence.begin); at < sequence.offset() + until; ++at)
      for (int layer = 0; layer < model.shape.n_layer; ++layer)
        for (int head = 0; head < model.shape.n_kv_head; ++head) {
          const HeadCache cache = caches[s].at(layer, which, head);
          model.kernels.put_key(model.cache_shape(), cache, at - sequence.begin, zero.data(), 0, model.shape.head_dim);
          model.kernels.put_value(model.cache_shape(), cache, at - sequence.begin, zero.data(), 0,
                                  model.shape.head_dim);
        }
  }
}

// Passes of at most as many rows as the workspace holds, over canvases whose widths are set.
void SessionImpl::pass_in_parts(const std::vector<int>& which) {
  for (size_t first = 0, last = 0; first < which.size(); first = last) {
    for (int rows = 0; last < which.size(); ++last) {
      rows += slots[which[last]].sequences * slots[which[last]].width;
      if (last > first && rows > ws.rows) break;
    }
    pass(which.data() + first, int(last - first), nullptr);
  }
}

// The smaller model draws the window one token at a time, with the same noise. What was decided since is known to it by
// then. Of the inputs it has read, those before this model's position are right: their tokens were decided as it had
// guessed them.
void SessionImpl::guess_with_draft(int window) {
  std::vector<int> batch;
  batch.reserve(capacity);
  for (int i : turn) {
    Slot& mine = slots[i];
    for (int& p = mine.draft_told; p < mine.position; ++p) {
      draft->tokens_of(i)[p] = tokens_of(i)[p];
      draft->guesses_of(i)[p] = int32_t(tokens_of(i)[p]);
      draft->known_[size_t(i) * n_positions + p] = 1;
    }
    Slot& theirs = draft->slots[i];
    theirs.position = std::min(mine.draft_fed, mine.position);
    theirs.width = mine.position - theirs.position + 1;
    mine.draft_fed = mine.position + 1;
    batch.push_back(i);
  }
  draft->pass_in_parts(batch);
  for (int place = 1; place + 1 < window; ++place) {
    batch.clear();
    for (int i : turn) {
      if (draft->slots[i].position >= n_positions) continue;
      draft->slots[i].width = 1;
      ++slots[i].draft_fed;
      batch.push_back(i);
    }
    if (!batch.empty()) draft->pass_in_parts(batch);
  }
  for (int i : turn) {
    const Slot& mine = slots[i];
    const int until = std::min(mine.position + window - 1, mine.limit - 1);
    for (int p = mine.position; p < until; ++p)
      if (!known(i, p)) guesses_of(i)[p] = int32_t(draft->tokens_of(i)[p]);
  }
}

WindowTuner& SessionImpl::tuner_for(int sequences) {
  int bucket = 1;
  while (bucket < sequences) bucket *= 2;
  const auto found = tuners.find(bucket);
  if (found != tuners.end()) return found->second;
  // Passes with a draft cost more than those without, so what is known of these says nothing.
  return tuners.emplace(bucket, WindowTuner(draft ? WindowStatistics{} : model.window_statistics(bucket)))
      .first->second;
}

// Whether choose_turn() would choose the same canvases again: all of them have something to draw, and nobody waits for
// a place that is free.
bool SessionImpl::turn_stands() const {
  if (turn_wanted == 0 || turn.empty()) return false;
  int sequences = 0;
  for (int i : turn) {
    if (!slots[i].working()) return false;
    sequences += slots[i].sequences;
  }
  if (sequences != turn_sequences) return false;  // a slot of the turn holds another canvas now
  const bool full = !turn_of_all && size_t(sequences) >= turn_wanted;
  return full ||
         size_t(std::count_if(slots.begin(), slots.end(), [](const Slot& s) { return s.working(); })) == turn.size();
}

// Whose turn it is: those that have waited longest, as many as the tuner says. Places of canvases that are done are
// filled at once. Returns whether there is anything to draw.
bool SessionImpl::choose_turn() {
  if (turn_stands()) return true;
  turn.erase(std::remove_if(turn.begin(), turn.end(), [&](int i) { return !slots[i].working(); }), turn.end());
  std::vector<uint8_t> drawing(capacity);
  for (int i : turn) drawing[i] = true;
  std::vector<int> order = turn;
  for (int i = 0; i < capacity; ++i)
    if (slots[i].working() && !drawing[i]) order.push_back(i);
  std::stable_sort(order.begin() + turn.size(), order.end(),
                   [&](int a, int b) { return slots[a].served < slots[b].served; });
  // Whoever comes when everybody was in is not kept waiting for the turn's end.
  if (turn_wanted == 0 || (turn_of_all && order.size() > turn.size())) {
    std::vector<double> upto;
    double bytes = 0;
    for (int i : order)
      for (int s = 0; s < slots[i].sequences; ++s) upto.push_back(bytes += key_bytes(slots[i], s));
    turn_wanted = turn_tuner.choose(upto);
    turn_of_all = turn_wanted >= upto.size();
    turn_measured = turn_seconds == 0;
  }
  turn.clear();
  turn_sequences = 0;
  for (int i : order) {
    if (size_t(turn_sequences) >= turn_wanted) break;
    turn.push_back(i);
    turn_sequences += slots[i].sequences;
    slots[i].served = turns;
  }
  turn_measured &= size_t(turn_sequences) >= turn_wanted;
  return !turn.empty();
}

// Keys and values of a sequence, shared ones not counted.
double SessionImpl::key_bytes(const Slot& slot, int s) const {
  const Sequence& sequence = slot.sequence[s];
  const CacheShape shape = model.cache_shape();
  const int inputs = sequence.offset() + slot.position - sequence.begin + 1;
  return double(model.shape.n_layer) * model.shape.n_kv_head * (shape.k_bytes(inputs) + shape.v_bytes(inputs));
}

void SessionImpl::end_turn() {
  turn_tuner.passed(turn_tokens, turn_seconds, turn_measured);
  turn.clear();
  turn_wanted = 0;
  turn_tokens = turn_seconds = 0;
  ++turns;
}

void SessionImpl::step(double seconds) {
  double spent = 0;
  while (choose_turn()) {
    WindowTuner* tuner = fixed_window ? nullptr : &tuner_for(turn_sequences);
    const double passed = pass_of_turn(tuner);
    spent += passed;
    turn_tokens += kept;
    turn_seconds += passed;
    turn_measured &= !tuner || !tuner->trying();
    const bool finished = std::any_of(turn.begin(), turn.end(), [&](int i) { return !slots[i].working(); });
    if (turn_seconds >= turn_tuner.statistics().seconds) end_turn();
    if (finished || spent >= seconds) break;
  }
  if (!draft && std::none_of(slots.begin(), slots.end(), [](const Slot& slot) { return slot.working(); })) {
    for (const auto& [bucket, known] : tuners) model.keep_window_statistics(bucket, known.statistics());
    model.keep_turn_statistics(turn_tuner.statistics());
  }
}

// Returns the seconds it took.
double SessionImpl::pass_of_turn(WindowTuner* tuner) {
  const auto started = Clock::now();
  const int planned = tuner ? tuner->plan() : fixed_window;
  // A draft's guesses are all of one kind, and their number must be known beforehand.
  const int width = planned ? planned : draft ? tuner->width(kNone, kNone, kWidestChoice - 1) : tuner->widest();
  if (draft && width > 1) guess_with_draft(width);
  std::vector<int> batch;
  batch.reserve(capacity);
  int rows = 0, scored = 0, drawing = 0;
  kept = 0;
  for (int i : turn) {
    Slot& slot = slots[i];
    // Known tokens are certain, so they widen the window.
    int sure = slot.position;
    while (sure < slot.limit && sure - slot.position < kKnownRun && known(i, sure)) ++sure;
    // A draft's guesses end with its window.
    slot.width = std::min(draft ? std::max(width, sure - slot.position + 1) : width + sure - slot.position,
                          slot.limit - slot.position);
    if (!draft) {
      const size_t start = size_t(i) * n_positions;
      guesser.guess(guesses.data() + start, known_.data() + start, slot.position, slot.position + slot.width - 1,
                    slot.scored, slot.wrong, kinds.data() + start);
      if (!planned)
        slot.width =
            std::max(std::min(sure - slot.position + 1, slot.width),
                     tuner->width(&kinds[start + slot.position], &known_[start + slot.position], slot.width - 1));
    }
    if (slot.careful) slot.width = 1;
    ++drawing;
    scored += slot.width;
    if (rows + slot.sequences * slot.width > ws.rows) {
      pass(batch.data(), int(batch.size()), tuner);
      batch.clear();
      rows = 0;
    }
    batch.push_back(i);
    rows += slot.sequences * slot.width;
  }
  pass(batch.data(), int(batch.size()), tuner);
  // Known tokens and the end of the canvas change widths: a pass of quite another width than planned says nothing about
  // it, except that with so many known tokens it is the narrowest there is.
  const bool narrow = 4 * scored < 3 * planned * drawing, wide = 4 * scored > 5 * planned * drawing;
  const bool as_planned = !narrow && (!wide || (tuner && tuner->trying()));
  const double seconds = since(started);
  if (tuner && warm && (!planned || as_planned))
    tuner->passed(drawing, planned ? planned : double(scored) / drawing, double(kept) / drawing, seconds, planned > 0);
  warm = true;
  return seconds;
}

// One pass of all canvases; positions and tokens stay as they are, so that the next one does the same work.
void SessionImpl::rehearse() {
  std::vector<int> which(capacity);
  for (int i = 0; i < capacity; ++i) {
    which[i] = i;
    slots[i].width = std::min(fixed_window, n_positions - slots[i].position);
  }
  const int position = slots[0].position;
  pass_in_parts(which);
  for (Slot& slot : slots) slot.position = position;
}

}  // namespace fastigpt
