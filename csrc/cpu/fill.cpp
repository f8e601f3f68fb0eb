// Filling canvases: the shared prefix, then passes that each score a window of every unfinished image.
//
// A window is the last decided token followed by guesses. The noise of every position is fixed, so the token drawn there is a
// function of the tokens before it: the draws up to the first wrong guess are those of one token at a time (Wiggers and
// Hoogeboom, "Predictive sampling with forecasting autoregressive models", 2020; Song et al., "Accelerating feedforward
// computation via parallel nonlinear equation solving", 2021). Draws after a wrong guess become the next guesses, corrected; see
// guess.h.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "filter.h"
#include "guess.h"
#include "model.h"
#include "window.h"

namespace fastigpt {
namespace {

constexpr int kPassRows = 512;    // tokens in a pass, all images together
constexpr int kWidestChoice = WindowStatistics::width[WindowStatistics::kWidths - 1];  // window that the tuner may choose
constexpr uint8_t kNone[kWidestChoice] = {};
constexpr int kKnownRun = 64;     // known tokens that a window takes along
using Clock = std::chrono::steady_clock;

}  // namespace

struct FillImpl {
  struct Image {
    uint64_t index;
    int source;       // prefix it shares
    int position;     // first undecided
    int end;          // one past the last unknown token; the rest is known
    int scored;       // the last pass drew tokens for positions before this one
    int wrong = -1;   // what the last decided token was taken for; −1: for itself
    int row = 0, width = 0;  // this pass: first row and tokens; without the prompt, rows follow at row + width
  };

  FillImpl(const ModelImpl& model, int n, const int64_t* tokens, const uint64_t* index, const int64_t* source,
           const int64_t* prompt, const DrawSettings& settings, int window, bool made_up = false);

  void prefill(const int64_t* source, const int64_t* prompt);
  void run_stretches(std::vector<Stretch> stretches, const std::vector<int>& image_of, const int64_t* prompt);
  int advance(double seconds);
  void rehearse();
  void pass(const int* images, int count);
  void draw_row(const Image& image, int j, FilterScratch& filter, float* scores);
  int pick(const float* scores, const Image& image, int position) const;
  void settle(int which);
  void guess_with_draft(int window);
  void pass_in_parts(const std::vector<int>& which);

  bool known(int image, int position) const { return known_[size_t(image) * n_pixels + position]; }

  const ModelImpl& model;
  const int n, n_pixels, lanes;  // lanes: of one image, 2 with guidance
  const int offset[2];           // prompt slots of the lane with the prompt, and of the one without
  const DrawSettings settings;
  const int fixed_window;        // 0: the tuner's choice
  const bool made_up;            // the caches are filled with small numbers instead of the known tokens' keys and values
  int kept = 0;                  // tokens of this pass
  bool warm = false;             // the first pass pays for memory that was never touched
  std::unique_ptr<WindowTuner> tuner;
  std::vector<int64_t> tokens;
  std::vector<uint8_t> known_, pass_starts, kinds;  // kinds: of the guesses
  Guesser guesser;
  std::vector<int32_t> guesses;  // decided tokens, then the last draws and guesses
  std::vector<Image> images;
  std::vector<KvCache> prefixes;          // [lane]: one sequence for each source that several images share
  std::vector<KvCache> caches;            // [lane]: one sequence for each image
  std::vector<int> begin[2];              // [lane][image]: slots that are in the prefix
  std::unique_ptr<Workspace> ws;
  std::vector<FilterScratch> filters;
  std::vector<int> drawn;                 // [row]: y of this pass
  std::vector<std::pair<int, int>> draws; // image and place in its window
  std::atomic<int> ticket{0};
  Pass decode;
  std::unique_ptr<FillImpl> draft;        // the same job on a smaller model, whose tokens are this one's guesses
  std::vector<int> draft_fed;             // [image]: inputs that the draft has read, right or wrong
  std::vector<int> draft_told;            // [image]: decided tokens that the draft knows of
};

FillImpl::FillImpl(const ModelImpl& model, int n, const int64_t* tokens_in, const uint64_t* index, const int64_t* source,
                   const int64_t* prompt, const DrawSettings& settings, int window, bool made_up)
    : model(model), n(n), n_pixels(model.shape.n_pixels), lanes(settings.guided ? 2 : 1),
      offset{prompt ? model.shape.prompt_length : 0, 0}, settings(settings), fixed_window(window), made_up(made_up),
      tokens(tokens_in, tokens_in + size_t(n) * n_pixels), known_(tokens.size()), pass_starts(tokens.size()), kinds(tokens.size()),
      guesser(model.shape.columns), guesses(tokens.size()), images(n) {
  for (size_t i = 0; i < tokens.size(); ++i) known_[i] = tokens[i] >= 0, guesses[i] = known_[i] ? int32_t(tokens[i]) : 0;
  for (int i = 0; i < n; ++i) {
    Image& image = images[i];
    image.index = index[i];
    image.position = 0;
    while (image.position < n_pixels && known(i, image.position)) ++image.position;
    image.end = n_pixels;
    while (image.end > 0 && known(i, image.end - 1)) --image.end;
    image.scored = image.position;
    settle(i);
  }
  const int widest = window ? window : kWidestChoice;
  const int rows = std::max({256, lanes * (std::min(widest, n_pixels) + kKnownRun), std::min(kPassRows, n * lanes * std::min(widest, n_pixels))});
  ws.reset(new Workspace(model.shape, model.kernels, model.weights, model.cache_shape(), rows, model.shape.context(), model.pool.size()));
  filters.assign(model.pool.size(), FilterScratch(model.shape.n_colors));
  drawn.resize(rows);
  draws.reserve(rows);
  decode = Pass{ws.get(), {}, {}, {}, model.shape.n_layer, true};
  decode.stretches.reserve(n * lanes);
  decode.first_row.reserve(n * lanes);
  decode.inputs.reserve(rows);
  if (!window) tuner.reset(new WindowTuner(model.window_statistics(n * lanes)));
  prefill(source, prompt);
}

// An image whose unknown tokens are all decided is finished.
void FillImpl::settle(int which) {
  if (images[which].position >= images[which].end) images[which].position = n_pixels;
}

// The inputs before the last decided token go into the caches; that token is fed by the first pass.
void FillImpl::prefill(const int64_t* source, const int64_t* prompt) {
  struct Group { int first, count, inputs; };  // images, and inputs that all of them share, the prompt apart
  std::vector<Group> groups;
  for (int i = 0; i < n; ++i) {
    const int64_t* row = tokens.data() + size_t(i) * n_pixels;
    bool joins = false;
    if (!groups.empty() && source[i] == source[groups.back().first]) {
      const Group& g = groups.back();
      const size_t words = size_t(model.shape.prompt_length);
      joins = images[i].position == images[g.first].position &&
              std::equal(row, row + std::min(images[i].position, n_pixels), tokens.data() + size_t(g.first) * n_pixels) &&
              (!prompt || std::equal(prompt + i * words, prompt + (i + 1) * words, prompt + g.first * words));
    }
    if (joins)
      ++groups.back().count;
    else
      groups.push_back({i, 1, images[i].position});
    images[i].source = int(groups.size()) - 1;
  }
  prefixes.resize(lanes);
  caches.resize(lanes);
  for (int lane = 0; lane < lanes; ++lane) {
    begin[lane].assign(n, 0);
    // Only what several images share is stored apart, in whole blocks of keys.
    int longest = 0, own = 0;
    for (int i = 0; i < n; ++i) {
      const Group& g = groups[images[i].source];
      const bool done = images[i].position >= n_pixels;
      if (g.count > 1 && !done) begin[lane][i] = (offset[lane] + g.inputs) / kKeyBlock * kKeyBlock;
      if (g.count > 1 && !done) longest = std::max(longest, offset[lane] + g.inputs);
      own = std::max(own, offset[lane] + n_pixels - begin[lane][i]);
    }
    caches[lane] = KvCache(model.shape, model.cache, n, own);
    if (longest >= kKeyBlock) prefixes[lane] = KvCache(model.shape, model.cache, int(groups.size()), longest);
    if (made_up) {
      // 0x3c3c is a small bfloat16, 0x3c3c3c3c a small float; every page is written, or reading it would cost nothing.
      std::memset(caches[lane].memory.as<>(), 0x3c, caches[lane].memory.size());
      continue;
    }
    std::vector<Stretch> stretches;
    std::vector<int> image_of;
    for (size_t g = 0; g < groups.size(); ++g) {
      const int first = groups[g].first, inputs = offset[lane] + groups[g].inputs;
      if (images[first].position >= n_pixels || inputs == 0) continue;
      const bool shared = begin[lane][first] > 0;
      if (shared) {
        stretches.push_back({&prefixes[lane], int(g), nullptr, 0, 0, 0, inputs});
        image_of.push_back(first);
      } else {
        for (int i = first; i < first + groups[g].count; ++i) {
          stretches.push_back({&caches[lane], i, nullptr, 0, 0, 0, inputs});
          image_of.push_back(i);
        }
      }
    }
    if (lane == 1)
      run_stretches(std::move(stretches), image_of, nullptr);
    else
      run_stretches(std::move(stretches), image_of, prompt);
    // What is left over after the last whole block starts each image's own cache.
    for (int i = 0; i < n; ++i) {
      if (begin[lane][i] == 0) continue;
      const KvCache &from = prefixes[lane], &to = caches[lane];
      const int b = begin[lane][i];
      if (b >= from.slots) continue;
      for (int layer = 0; layer < model.shape.n_layer; ++layer)
        for (int head = 0; head < model.shape.n_head; ++head) {
          const HeadCache a = from.at(layer, images[i].source, head), c = to.at(layer, i, head);
          std::memcpy(c.k, a.k + from.shape.k_bytes(b), from.shape.k_bytes(kKeyBlock));
          std::memcpy(c.v, a.v + from.shape.v_bytes(b), from.shape.v_bytes(kKeyBlock));
          if (a.k_scale) {
            std::memcpy(c.k_scale, a.k_scale + b, kKeyBlock * sizeof(float));
            std::memcpy(c.v_scale, a.v_scale + b, kKeyBlock * sizeof(float));
          }
        }
    }
  }
}

// Runs known inputs through the model, as many to a pass as fit. prompt: null if these sequences have none.
void FillImpl::run_stretches(std::vector<Stretch> stretches, const std::vector<int>& image_of, const int64_t* prompt) {
  const int words = prompt ? model.shape.prompt_length : 0;
  Pass pass{ws.get(), {}, {}, {}, model.shape.n_layer, false};
  size_t next = 0;
  while (next < stretches.size()) {
    pass.clear();
    for (size_t i = next; i < stretches.size() && pass.rows() < ws->rows; ++i) {
      Stretch& s = stretches[i];
      Stretch part = s;
      part.count = std::min(s.count, ws->rows - pass.rows());
      pass.add(part);
      const int image = image_of[i];
      for (int slot = part.slot; slot < part.slot + part.count; ++slot)
        pass.inputs.push_back(slot < words ? model.word(prompt[size_t(image) * words + slot], slot)
                                           : model.pixel(slot == words ? model.shape.n_colors : tokens[size_t(image) * n_pixels + slot - words - 1], slot - words));
      s.slot += part.count;
      s.count -= part.count;
      if (s.count == 0) next = i + 1;
    }
    model.forward(pass);
  }
}

int FillImpl::pick(const float* scores, const Image& image, int position) const {
  if (settings.temperature == 0) {
    int best = -1;
    for (int v = 0; v < model.shape.n_colors; ++v)
      if (scores[v] > -std::numeric_limits<float>::infinity() && (best < 0 || scores[v] > scores[best])) best = v;
    return best;
  }
  return model.kernels.draw(scores, model.shape.n_colors, {settings.seed, image.index, uint32_t(position)});
}

// Scores of row j of an image's window, after filters.
void FillImpl::draw_row(const Image& image, int j, FilterScratch& filter, float* scores) {
  const float* logits = ws->logits.as<float>() + (image.row + j) * ws->logits_stride;
  const float* without = lanes == 2 ? logits + image.width * ws->logits_stride : nullptr;
  filter_logits(logits, without, model.shape.n_colors, settings, filter, scores);
  for (size_t v = model.shape.n_colors; v < ws->logits_stride; ++v) scores[v] = -std::numeric_limits<float>::infinity();
}

// One pass over some images, whose widths and guesses are set.
void FillImpl::pass(const int* which, int count) {
  decode.clear();
  draws.clear();
  for (int k = 0; k < count; ++k) {
    Image& image = images[which[k]];
    const int64_t* row = tokens.data() + size_t(which[k]) * n_pixels;
    const int32_t* guessed = guesses.data() + size_t(which[k]) * n_pixels;
    image.row = decode.rows();
    for (int lane = 0; lane < lanes; ++lane) {
      const bool shared = begin[lane][which[k]] > 0;
      decode.add({&caches[lane], which[k], shared ? &prefixes[lane] : nullptr, image.source, begin[lane][which[k]],
                  offset[lane] + image.position, image.width});
      for (int j = 0; j < image.width; ++j) {
        const int at = image.position + j;  // this input stands at position `at` and predicts token `at`
        decode.inputs.push_back(model.pixel(at == 0 ? model.shape.n_colors : j == 0 ? row[at - 1] : guessed[at - 1], at));
      }
    }
    for (int j = 0; j < image.width; ++j)
      if (!known(which[k], image.position + j)) draws.push_back({which[k], j});
  }
  model.begin(decode);
  ticket.store(0, std::memory_order_relaxed);
  std::atomic<bool> broken{false};
  model.pool.run([&](int thread) {
    model.run(decode, thread);
    float* scores = ws->thread[thread].scores.as<float>();
    for (int task; (task = ticket.fetch_add(1, std::memory_order_relaxed)) < int(draws.size());) {
      const auto [i, j] = draws[task];
      const Image& image = images[i];
      draw_row(image, j, filters[thread], scores);
      const int token = pick(scores, image, image.position + j);
      if (token < 0) broken.store(true, std::memory_order_relaxed);
      drawn[image.row + j] = token;
    }
  });
  if (broken) throw std::runtime_error("the model's logits are not finite numbers");
  for (int k = 0; k < count; ++k) {
    Image& image = images[which[k]];
    int64_t* row = tokens.data() + size_t(which[k]) * n_pixels;
    int32_t* guessed = guesses.data() + size_t(which[k]) * n_pixels;
    pass_starts[size_t(which[k]) * n_pixels + image.position] = 1;
    const int before = kept;
    bool right = true;
    for (int j = 0; j < image.width; ++j) {
      const int at = image.position + j;
      const int token = known(which[k], at) ? int(row[at]) : drawn[image.row + j];
      const int guess = guessed[at];
      guessed[at] = token;
      if (!right) continue;
      row[at] = token;
      ++kept;
      guesser.learn(guessed, at);
      right = guess == token;
      image.wrong = right ? -1 : guess;
      if (tuner && j + 1 < image.width && !known(which[k], at)) tuner->guessed(kinds[size_t(which[k]) * n_pixels + at], right);
    }
    image.scored = image.position + image.width;
    image.position += kept - before;
    settle(which[k]);
  }
}

// Passes of at most as many rows as the workspace holds, over images whose widths are set.
void FillImpl::pass_in_parts(const std::vector<int>& which) {
  for (size_t first = 0, last = 0; first < which.size(); first = last) {
    for (int rows = 0; last < which.size() && (last == first || rows + lanes * images[which[last]].width <= ws->rows); ++last)
      rows += lanes * images[which[last]].width;
    pass(which.data() + first, int(last - first));
  }
}

// The smaller model draws the window one token at a time, with the same noise. What was decided since is known to it by then.
// Of the inputs it has read, those before this model's position are right: their tokens were decided as it had guessed them.
void FillImpl::guess_with_draft(int window) {
  std::vector<int> batch;
  batch.reserve(n);
  for (int i = 0; i < n; ++i) {
    const int position = images[i].position;
    if (position >= n_pixels) continue;
    const size_t row = size_t(i) * n_pixels;
    for (int& p = draft_told[i]; p < position; ++p) {
      draft->tokens[row + p] = tokens[row + p];
      draft->guesses[row + p] = int32_t(tokens[row + p]);
      draft->known_[row + p] = 1;
    }
    Image& theirs = draft->images[i];
    theirs.position = std::min(draft_fed[i], position);
    theirs.width = position - theirs.position + 1;
    draft_fed[i] = position + 1;
    batch.push_back(i);
  }
  draft->pass_in_parts(batch);
  for (int place = 1; place + 1 < window; ++place) {
    batch.clear();
    for (int i = 0; i < n; ++i) {
      // A finished image stands at n_pixels, in either model.
      if (images[i].position >= n_pixels || draft->images[i].position >= n_pixels) continue;
      draft->images[i].width = 1;
      ++draft_fed[i];
      batch.push_back(i);
    }
    draft->pass_in_parts(batch);
  }
  for (int i = 0; i < n; ++i) {
    const Image& image = images[i];
    const int until = std::min(image.position + window - 1, image.end - 1);
    for (int p = image.position; p < until; ++p)
      if (!known(i, p)) guesses[size_t(i) * n_pixels + p] = int32_t(draft->tokens[size_t(i) * n_pixels + p]);
  }
}

int FillImpl::advance(double seconds) {
  const auto started = Clock::now();
  std::vector<int> batch;
  batch.reserve(n);
  for (;;) {
    const int planned = tuner ? tuner->plan() : fixed_window;
    // A draft's guesses are all of one kind, and their number must be known beforehand.
    const int width = planned ? planned : draft ? tuner->width(kNone, kNone, kWidestChoice - 1) : tuner->widest();
    const auto pass_started = Clock::now();
    if (draft && width > 1) guess_with_draft(width);
    int rows = 0, scored = 0, drawing = 0;
    kept = 0;
    batch.clear();
    for (int i = 0; i < n; ++i) {
      Image& image = images[i];
      if (image.position >= n_pixels) continue;
      // Known tokens are certain, so they widen the window.
      int sure = image.position;
      while (sure < image.end && sure - image.position < kKnownRun && known(i, sure)) ++sure;
      // A draft's guesses end with its window.
      image.width = std::min(draft ? std::max(width, sure - image.position + 1) : width + sure - image.position, image.end - image.position);
      if (!draft) {
        const size_t start = size_t(i) * n_pixels;
        guesser.guess(guesses.data() + start, known_.data() + start, image.position, image.position + image.width - 1,
                      image.scored, image.wrong, kinds.data() + start);
        if (!planned)
          image.width = std::max(std::min(sure - image.position + 1, image.width),
                                 tuner->width(&kinds[start + image.position], &known_[start + image.position], image.width - 1));
      }
      ++drawing;
      scored += image.width;
      if (rows + lanes * image.width > ws->rows) {
        pass(batch.data(), int(batch.size()));
        batch.clear();
        rows = 0;
      }
      batch.push_back(i);
      rows += lanes * image.width;
    }
    if (drawing == 0) return n_pixels;
    pass(batch.data(), int(batch.size()));
    // Known tokens and the end of the canvas change widths: a pass of quite another width than planned says nothing about it.
    const bool as_planned = 4 * std::abs(scored - planned * drawing) <= planned * drawing;
    if (tuner && warm && (!planned || as_planned))
      tuner->passed(planned ? planned : double(scored) / drawing, double(kept) / drawing,
                    std::chrono::duration<double>(Clock::now() - pass_started).count(), planned > 0);
    warm = true;
    int least = n_pixels;
    for (const Image& image : images) least = std::min(least, image.position);
    if (least >= n_pixels && tuner && !draft) model.keep_window_statistics(n * lanes, tuner->statistics());
    if (least >= n_pixels || std::chrono::duration<double>(Clock::now() - started).count() >= seconds) return least;
  }
}

// One pass of all images; positions and tokens stay as they are, so that the next one does the same work.
void FillImpl::rehearse() {
  std::vector<int> batch;
  batch.reserve(n);
  const int position = images[0].position, window = fixed_window;
  for (int first = 0; first < n;) {
    batch.clear();
    int rows = 0;
    for (; first < n && rows + window <= ws->rows; ++first, rows += window) {
      Image& image = images[first];
      image.width = std::min(window, n_pixels - position);
      batch.push_back(first);
    }
    pass(batch.data(), int(batch.size()));
    for (int i : batch) images[i].position = position;
  }
}

FillJob::FillJob(const CpuModel& model, int n, const int64_t* tokens, const uint64_t* index, const int64_t* source,
                 const int64_t* prompt, const DrawSettings& settings, int window, const CpuModel* draft)
    : impl_(new FillImpl(*model.impl_, n, tokens, index, source, prompt, settings, window)) {
  if (!draft) return;
  // A draft that cannot read the prompt guesses without it.
  const ModelShape &mine = model.shape(), &theirs = draft->shape();
  const bool reads = prompt && mine.prompt_length == theirs.prompt_length && mine.n_words == theirs.n_words;
  DrawSettings plain = settings;
  plain.guided = settings.guided && reads;
  impl_->draft.reset(new FillImpl(*draft->impl_, n, tokens, index, source, reads ? prompt : nullptr, plain, window ? window : kWidestChoice));
  if (impl_->tuner) impl_->tuner.reset(new WindowTuner(WindowStatistics{}));  // its passes cost more than those without a draft
  for (const auto& image : impl_->images) impl_->draft_fed.push_back(image.position);
  impl_->draft_told = impl_->draft_fed;
}

FillJob::FillJob(const CpuModel& model, int n, int position, int window) {
  const size_t pixels = size_t(model.shape().n_pixels);
  std::vector<int64_t> tokens(n * pixels, -1), source(n);
  std::vector<uint64_t> index(n);
  for (int i = 0; i < n; ++i) {
    std::fill_n(tokens.begin() + i * pixels, position, 0);
    source[i] = i;
    index[i] = uint64_t(i);
  }
  impl_.reset(new FillImpl(*model.impl_, n, tokens.data(), index.data(), source.data(), nullptr, DrawSettings{}, window, true));
}

FillJob::~FillJob() = default;
void FillJob::rehearse() { impl_->rehearse(); }
int FillJob::advance(double seconds) { return impl_->advance(seconds); }
const int64_t* FillJob::tokens() const { return impl_->tokens.data(); }
const uint8_t* FillJob::pass_starts() const { return impl_->pass_starts.data(); }

}  // namespace fastigpt
