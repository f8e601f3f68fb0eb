// The slots of a session: canvases in the middle of being drawn, the caches they use, and the pass over some of them.
#pragma once
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "engine/guess.h"
#include "engine/model.h"
#include "engine/window.h"
#include "operators/filter.h"

namespace fastigpt {

constexpr int kPassRows = 512;  // tokens in a pass, all canvases together
constexpr int kKnownRun = 64;   // known tokens that a window takes along
constexpr int kWidestChoice = WindowStatistics::width[WindowStatistics::kWidths - 1];  // that the tuner may choose

// What several canvases read before their first unknown token, computed once. Whole blocks of keys are used where they
// lie; what is left over after the last of them is copied to each canvas.
struct SharedPrefix {
  SharedPrefix(const ModelImpl& model, std::vector<int64_t> ids)
      : ids(std::move(ids)), cache(model.shape, model.cache, 1, int(this->ids.size())) {}
  const std::vector<int64_t> ids;  // prefix ids as −1 − id, then tokens
  const KvCache cache;
};

// One of the sequences of a canvas: with its prefix, or, guided, with the negative one.
struct Sequence {
  std::vector<int64_t> prefix;
  std::shared_ptr<const SharedPrefix> shared;            // or null
  int begin = 0;                                         // inputs that are in `shared`, a multiple of kKeyBlock
  int offset() const { return int(prefix.size()) - 1; }  // input slot of canvas position 0
};

struct Slot {
  bool taken = false;
  bool ready = false;    // its caches hold all inputs before `position`
  bool careful = false;  // the last pass met logits that are not finite, perhaps only because of a wrong guess
  bool proved = false;   // they are known to be finite: a token was drawn after them
  uint64_t index = 0;
  DrawSettings settings;
  bool score = false;
  int position = 0;  // the first that is not decided, all inputs before it are read but the last
  int stop = 0;      // the canvas is drawn up to here
  int limit = 0;     // and there is nothing to do from here on: stop, or one past the last unknown token before it
  int scored = 0;    // the last pass drew tokens for positions before this one
  int wrong = -1;    // what the last decided token was taken for; −1: for itself
  int row = 0, width = 0;  // this pass: first row and tokens; rows of the negative prefix follow at row + width
  int sequences = 1;       // 2: guided
  Sequence sequence[2];
  double log_likelihood = 0;
  int draft_fed = 0;    // inputs that the draft has read, right or wrong
  int draft_told = 0;   // decided tokens that the draft knows of
  uint64_t served = 0;  // the last turn it was in
  bool working() const { return taken && position < limit; }
};

struct SessionImpl {
  SessionImpl(const ModelImpl& model, int capacity, int window);

  // session.cpp: slots come and go.
  std::vector<int> free_slots(size_t count) const;
  void put(int slot, const CanvasRequest& request);
  void prefill(const std::vector<int>& slots);
  void read_inputs(std::vector<Stretch> stretches, const std::vector<std::pair<const Sequence*, const int64_t*>>& what);
  void remove(int slot);
  void resume(int slot, int stop);
  void copy(int from, int to, uint64_t index);

  // session_step.cpp: passes.
  void step(double seconds);
  bool turn_stands() const;
  bool choose_turn();
  double key_bytes(const Slot& slot, int sequence) const;
  void end_turn();
  double pass_of_turn(WindowTuner* tuner);
  void pass(const int* slots, int count, WindowTuner* tuner);
  void pass_in_parts(const std::vector<int>& slots);
  void draw_row(const Slot& slot, int which, int j, FilterScratch& filter, float* scores);
  bool decide(int which, WindowTuner* tuner);
  void clear(int which, int from, int until);
  void guess_with_draft(int window);
  void rehearse();
  WindowTuner& tuner_for(int sequences);

  void set_limit(Slot& slot, int which);
  int64_t* tokens_of(int slot) { return tokens.data() + size_t(slot) * n_positions; }
  int32_t* guesses_of(int slot) { return guesses.data() + size_t(slot) * n_positions; }
  bool known(int slot, int position) const { return known_[size_t(slot) * n_positions + position]; }
  KvCache& cache_of(int sequence);  // lanes of all slots, for the longest prefix that has come
  void carry(const KvCache& from, int from_slot, const KvCache& to, int to_slot, int sequence) const;

  const ModelImpl& model;
  const int capacity, n_positions;
  const int fixed_window;  // 0: the tuners' choice
  std::vector<Slot> slots;
  std::vector<int64_t> tokens;                      // [capacity, n_positions]; so are the next four
  std::vector<uint8_t> known_, pass_starts, kinds;  // kinds: of the guesses
  std::vector<int32_t> guesses;                     // decided tokens, then the last draws and guesses
  Guesser guesser;
  KvCache caches[2];           // one lane for each slot; the second appears with the first guided canvas
  size_t longest[2] = {1, 1};  // prefix that has come
  std::map<std::vector<int64_t>, std::weak_ptr<const SharedPrefix>> prefixes;
  std::map<int, WindowTuner> tuners;  // by the number of sequences, in powers of two
  std::vector<int> turn;              // slots that draw at present
  int turn_sequences = 0;             // of those
  size_t turn_wanted = 0;             // sequences that the tuner asked for; 0: it is to be asked
  bool turn_of_all = false;
  bool turn_measured = false;  // it had as many in all passes, and none merely tried out a width
  uint64_t turns = 1;          // this one; canvases that have just come were in none
  double turn_tokens = 0, turn_seconds = 0;
  TurnTuner turn_tuner;
  int kept = 0;       // tokens of this pass, all canvases together
  bool warm = false;  // the first pass pays for memory that was never touched
  Workspace ws;
  std::vector<FilterScratch> filters;
  std::vector<int> drawn;                  // [row]: token of this pass; −1: its logits are not finite
  std::vector<double> nats;                // [row]: log-likelihood of a known token
  std::vector<std::pair<int, int>> draws;  // slot and place in its window
  std::atomic<int> ticket{0};
  Pass decode;

  std::unique_ptr<SessionImpl> draft;  // the same canvases on a smaller model, whose tokens are this one's guesses
  std::vector<int64_t> draft_prefix;
  bool draft_reads = false;  // the draft has the same prefixes
};

}  // namespace fastigpt
