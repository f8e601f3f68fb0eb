// Runs every instruction set of the CPU engine, and of a VQ's networks, on odd shapes, for the sanitizers to watch,
// and checks the promise that batch, window, prefix sharing and threads change no bit. Built and run by
// tests/test_engine_cpu_sanitized.py.
#undef NDEBUG
#include <algorithm>
#include <atomic>
#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "engine/model.h"
#include "fastigpt/decode.h"
#include "fastigpt/rows.h"
#include "fastigpt/threads.h"
#include "operators/kernels.h"
#include "runtime/helpers.h"
#include "tests/check_turns.h"
#include "tests/check_vq_networks.h"
#include "tests/check_windows.h"
#include "tests/noise.h"
#include "tests/random_model.h"

using namespace fastigpt;

using Canvas = std::vector<int64_t>;

static CanvasRequest request(const ModelShape& s, const Canvas& tokens, uint64_t index, const DrawSettings& draw,
                             const std::vector<int64_t>& prefix) {
  const std::vector<int64_t> without{s.n_prefix_tokens - 1};
  return {tokens.data(), index, draw, prefix, draw.guided ? without : std::vector<int64_t>{}, s.n_positions, false};
}

static Canvas canvas_of(const Session& session, int slot, const Canvas& given, const ModelShape& s) {
  const Canvas out(session.tokens(slot), session.tokens(slot) + s.n_positions);
  for (size_t i = 0; i < out.size(); ++i) {
    assert(out[i] >= 0 && out[i] < s.n_tokens);
    assert(given[i] < 0 || given[i] == out[i]);
  }
  return out;
}

static Canvas alone(const CpuModel& m, const CanvasRequest& wanted, const Canvas& given, int window) {
  Session session(m, 1, window, nullptr, {});
  const int slot = session.add({wanted})[0];
  while (session.decided(slot) < m.shape().n_positions) session.step(0);
  return canvas_of(session, slot, given, m.shape());
}

// Canvases that come when others are half done, and leave when they are full; some are given up on the way.
static std::vector<Canvas> crowded(const CpuModel& m, const std::vector<CanvasRequest>& wanted,
                                   const std::vector<Canvas>& given, int capacity, int window, bool together,
                                   const CpuModel* draft) {
  const ModelShape& s = m.shape();
  Session session(m, capacity, window, draft, {draft ? draft->shape().n_prefix_tokens - 1 : 0});
  std::vector<Canvas> done(wanted.size());
  std::vector<int> who(capacity, -1);
  size_t next = 0, left = wanted.size();
  for (int round = 0; left > 0; ++round) {
    while (next < wanted.size() && session.free_slots() > 0 && (round % 2 == 0 || together)) {
      std::vector<CanvasRequest> some{wanted[next]};
      while (together && next + some.size() < wanted.size() && int(some.size()) < session.free_slots())
        some.push_back(wanted[next + some.size()]);
      if (round % 3 == 1) session.remove(session.add({wanted[next]})[0]);
      for (int slot : session.add(some)) who[slot] = int(next++);
    }
    session.step(0);
    for (int slot = 0; slot < capacity; ++slot) {
      if (!session.taken(slot) || session.decided(slot) < s.n_positions) continue;
      done[who[slot]] = canvas_of(session, slot, given[who[slot]], s);
      session.remove(slot);
      --left;
    }
  }
  return done;
}

static void check(const ModelShape& s, DType weights, DType cache, Isa isa, bool thorough) {
  const auto one = make(s, weights, cache, isa, 1), two = make(s, weights, cache, isa, 2);
  const int n = 3, L = s.prefix_length;
  std::vector<int64_t> known(size_t(n) * s.n_positions), prefix(size_t(n) * L);
  for (auto& t : known) t = int64_t(rng() % s.n_tokens);
  for (int i = 0; i < L; ++i) prefix[i] = prefix[L + i] = prefix[2 * L + i] = int64_t(rng() % s.n_prefix_tokens);

  // Scores: together and alone, whole and cut short. Outputs are poisoned first.
  std::vector<float> all(known.size() * s.n_tokens, NAN), some(size_t(s.n_positions) * s.n_tokens, NAN);
  one->score(known.data(), n, s.n_positions, prefix.data(), L, -1, all.data());
  for (float x : all) assert(std::isfinite(x));
  const int shorter = std::max(1, s.n_positions - 1);
  two->score(known.data() + size_t(2) * s.n_positions, 1, shorter, prefix.data(), L, -1, some.data());
  assert(
      !std::memcmp(some.data(), all.data() + size_t(2) * s.n_positions * s.n_tokens, size_t(shorter) * s.n_tokens * 4));
  for (int layer = 0; layer <= s.n_layer; layer += s.n_layer) {
    std::vector<float> hidden(known.size() * s.width, NAN);
    two->score(known.data(), n, s.n_positions, prefix.data(), 1, layer, hidden.data());
    for (float x : hidden) assert(std::isfinite(x));
  }

  // Canvases: a start that some share, holes, a known end; prefixes long and short; every way to draw.
  const int count = thorough ? 12 : 5;
  std::vector<Canvas> given;
  std::vector<CanvasRequest> wanted;
  std::vector<Canvas> want;
  given.reserve(count);
  for (int i = 0; i < count; ++i) {
    Canvas tokens(known.begin() + (i % n) * s.n_positions, known.begin() + (i % n + 1) * s.n_positions);
    for (int p = 0; p < s.n_positions; ++p) {
      if (p < s.n_positions / 3 && i % 4 != 3)
        tokens[p] = known[p];
      else if (i % 3 == 0 || (p % 5 != 2 && p < s.n_positions - i % 3))
        tokens[p] = -1;
    }
    given.push_back(std::move(tokens));
    DrawSettings draw;
    draw.seed = 0x123456789abcdef0ull + i;
    if (i % 4 == 1) draw.temperature = 0.7f, draw.top_k = 5, draw.top_p = 0.9;
    if (i % 4 == 2) draw.temperature = 0;
    if (i % 4 == 3) draw.guided = true, draw.guidance_scale = 2;
    const std::vector<int64_t> longest(prefix.begin(), prefix.begin() + L), start{s.n_prefix_tokens - 1};
    wanted.push_back(request(s, given[i], 3 + i, draw, i % 5 == 4 ? start : longest));
    want.push_back(alone(*one, wanted[i], given[i], 1));
  }
  for (int window : thorough ? std::vector<int>{1, 2, 300, 0} : std::vector<int>{9})
    for (bool together : {false, true}) assert(crowded(*two, wanted, given, 3, window, together, nullptr) == want);
  if (!thorough) return;
  for (int window : {3, 0}) assert(crowded(*two, wanted, given, 4, window, true, one.get()) == want);

  // A fork goes on as the canvas would have gone on with another index; a stop is a pause.
  for (int i = 0; i < 4; ++i) {
    Session session(*two, 3, 4, nullptr, {});
    CanvasRequest first = wanted[i];
    first.stop = s.n_positions / 2;
    first.score = i % 2;
    const int slot = session.add({first})[0];
    while (session.decided(slot) < first.stop) session.step(0);
    const auto forks = session.fork(slot, {wanted[i].index, 77, wanted[i].index});
    for (int fork : forks) session.resume(fork, s.n_positions);
    for (int fork : forks)
      while (session.decided(fork) < s.n_positions) session.step(0);
    assert(canvas_of(session, forks[0], given[i], s) == want[i] &&
           canvas_of(session, forks[2], given[i], s) == want[i]);
    Canvas half(session.tokens(forks[1]), session.tokens(forks[1]) + first.stop);
    assert(std::equal(half.begin(), half.end(), want[i].begin()));
    assert(session.log_likelihood(forks[0]) == session.log_likelihood(forks[2]) &&
           (session.log_likelihood(forks[0]) < 0) == (i == 1));  // the only one of known tokens behind
  }

  // Two threads of the caller on one model.
  std::vector<Canvas> first, second;
  std::thread other([&] { first = crowded(*two, wanted, given, 3, 3, true, nullptr); });
  second = crowded(*two, wanted, given, 2, 1, false, nullptr);
  other.join();
  assert(first == want && second == want);
}

// Canvases that draw in turns get what they get alone.
static void check_turns() {
  const ModelShape s{1, 1, 1, 40, 40, 33, 21, 100, 2, 2, 1e-5f, 5};
  const auto model = make(s, DType::f32, DType::f32, supported_isas().back(), 2);
  TurnStatistics shortest;
  shortest.bytes = shortest.seconds = 0;
  shortest.settled = true;
  impl_of(*model).keep_turn_statistics(shortest);
  std::vector<Canvas> given, want;
  std::vector<CanvasRequest> wanted;
  for (int i = 0; i < 50; ++i) {
    given.emplace_back(s.n_positions, -1);
    for (int j = 0; j < i % 4; ++j) given.back()[j * 5 % s.n_positions] = (i + j) % s.n_tokens;
  }
  for (int i = 0; i < 50; ++i) {
    DrawSettings draw;
    draw.seed = uint64_t(i) * 77;
    draw.guided = i % 3 == 0;
    draw.guidance_scale = 2;
    wanted.push_back(request(s, given[i], i, draw, {i % 2, 1}));
    want.push_back(alone(*model, wanted.back(), given[i], 1));
  }
  for (int window : {1, 0})
    for (bool together : {false, true}) assert(crowded(*model, wanted, given, 40, window, together, nullptr) == want);
}

// Decode over plain rows against a loop in double; every buffer is exactly as long as what may be read.
static void check_rows(Isa isa) {
  for (int d : {5, 24, 64, 96})
    for (int window : {1, 3, 67})
      for (int threads : {1, 3}) {
        rng.seed(d + window);
        const int n = 2, heads = 2, slots = 80, known = 9, start[2] = {0, slots - window};
        const auto q = noise(size_t(n) * window * heads * d, 1), k = noise(q.size(), 1), v = noise(q.size(), 1);
        auto keys = noise(size_t(n) * heads * slots * d, 1), values = noise(keys.size(), 1);
        auto first_keys = noise(size_t(heads) * known * d, 1), first_values = noise(first_keys.size(), 1);
        std::vector<float> out(q.size(), NAN);
        const int32_t positions[2] = {start[0], start[1]};
        const DecodeRows job{DType::f32,
                             DType::f32,
                             q.data(),
                             k.data(),
                             v.data(),
                             heads * d,
                             heads * d,
                             heads * d,
                             n,
                             window,
                             heads,
                             d,
                             {keys.data(), values.data(), nullptr, nullptr, n, slots},
                             positions,
                             {first_keys.data(), first_values.data(), nullptr, nullptr, 1, known},
                             nullptr,
                             out.data()};
        decode_rows(job, isa, threads);
        for (int b = 0; b < n; ++b)
          for (int j = 0; j < window; ++j)
            for (int h = 0; h < heads; ++h) {
              const float* query = &q[((size_t(b) * window + j) * heads + h) * d];
              std::vector<double> weights, sum(d);
              double total = 0;
              for (int pass = 0; pass < 2; ++pass)
                for (int s = -known; s <= start[b] + j; ++s) {
                  const size_t at =
                      s < 0 ? (size_t(h) * known + s + known) * d : ((size_t(b) * heads + h) * slots + s) * d;
                  const float *key = s < 0 ? &first_keys[at] : &keys[at],
                              *value = s < 0 ? &first_values[at] : &values[at];
                  if (pass == 0) {
                    double dot = 0;
                    for (int i = 0; i < d; ++i) dot += double(query[i]) * key[i];
                    weights.push_back(std::exp(dot / std::sqrt(double(d))));
                    total += weights.back();
                  } else {
                    for (int i = 0; i < d; ++i) sum[i] += weights[s + known] / total * value[i];
                  }
                }
              for (int i = 0; i < d; ++i)
                assert(std::fabs(out[((size_t(b) * window + j) * heads + h) * d + i] - sum[i]) < 1e-4);
            }
        // The narrow caches, for the sanitizers.
        std::vector<uint16_t> half(q.size(), 0x3f80), half_out(q.size()), half_keys(keys.size(), 0x3f80),
            half_values(keys.size(), 0x4000);
        DecodeRows narrow{DType::bf16,
                          DType::bf16,
                          half.data(),
                          half.data(),
                          half.data(),
                          heads * d,
                          heads * d,
                          heads * d,
                          n,
                          window,
                          heads,
                          d,
                          {half_keys.data(), half_values.data(), nullptr, nullptr, n, slots},
                          positions,
                          {},
                          nullptr,
                          half_out.data()};
        decode_rows(narrow, isa, threads);
        std::vector<int8_t> small_keys(keys.size(), 1), small_values(keys.size(), 2);
        std::vector<float> scales(size_t(n) * heads * slots, 0.5f), other_scales = scales;
        narrow.stored = DType::i8;
        narrow.cache = {small_keys.data(), small_values.data(), scales.data(), other_scales.data(), n, slots};
        decode_rows(narrow, isa, threads);
        assert(half_out[0] == 0x3f80);  // the one value it sees is 1

        const int colours = d * 3 + 1;
        const auto gain = noise(d, 0.1f, 1), weight = noise(size_t(colours) * d, 1),
                   hidden = noise(size_t(window) * d, 1);
        std::vector<int64_t> index(window, 5), position(window, 7), tokens(window, -1);
        SampleRows head{DType::f32,
                        DType::f32,
                        hidden.data(),
                        hidden.data(),
                        gain.data(),
                        weight.data(),
                        index.data(),
                        position.data(),
                        window,
                        d,
                        colours,
                        1e-5f,
                        {},
                        tokens.data()};
        head.settings.top_k = 4;
        head.settings.top_p = 0.9;
        head.settings.guided = true;
        sample_rows(head, isa, threads);
        for (int64_t token : tokens) assert(token >= 0 && token < colours);
      }
}

// Jobs of several callers on the shared helpers: all work is done, numbers are unique, what a body throws arrives, and
// there are as many helpers as the largest job may use, whatever was asked for before.
static void check_helpers() {
  const auto job = [](int threads) {
    std::vector<std::atomic<int>> parts(500), numbers(threads);
    std::atomic<size_t> next{0};
    share(threads, [&](int thread) {
      assert(thread >= 0 && thread < threads && numbers[thread]++ == 0);
      for (size_t part; (part = next++) < parts.size();) ++parts[part];
    });
    for (const auto& part : parts) assert(part == 1);
  };
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&job, caller] {
      for (int i = 0; i < 200; ++i) job(1 + (i + caller) % 5);
    });
  for (auto& caller : callers) caller.join();
  assert(helper_threads() == 4);
  for (int thrower = 0; thrower < 3; ++thrower) {
    std::atomic<int> arrived{0};
    try {
      share(3, [&](int thread) {
        ++arrived;
        while (arrived < 3) std::this_thread::yield();  // until two helpers are here
        if (thread == thrower) throw std::runtime_error("of a body");
      });
      assert(false);
    } catch (const std::runtime_error& error) { assert(error.what() == std::string("of a body")); }
  }
  job(5);
}

int main() {
  check_helpers();
  check_tuner();
  check_turn_tuner();
  check_turns();
  check_guesser();
  const ModelShape shapes[] = {
      {2, 3, 3, 5, 15, 7, 29, 7, 6, 20, 1e-5f, 6},  // nothing a multiple of anything, a prefix longer than a key block
      {1, 1, 1, 40, 40, 33, 21, 100, 1, 1, 1e-5f},
      {1, 2, 2, 96, 192, 200, 35, 65, 4, 3, 1e-5f},
      {1, 1, 1, 128, 128, 64, 18, 512, 1, 1, 1e-5f},
      {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1e-5f},  // the smallest there is
      // Llama's blocks: heads that share keys, pairs and gates that fill no panel, a head with a hidden layer
      {2, 6, 2, 10, 23, 37, 26, 70, 6, 19, 1e-5f, 5, Positions::rotary, Mlp::gated_silu, 41},
      {1, 9, 1, 100, 40, 16, 19, 33, 3, 2, 1e-5f, 4, Positions::rotary, Mlp::gated_silu},
      {1, 2, 2, 2, 3, 1, 5, 4, 2, 1, 1e-5f, 0, Positions::rotary, Mlp::gated_silu, 1},
  };
  const DType kinds[][2] = {
      {DType::f32, DType::f32}, {DType::bf16, DType::bf16}, {DType::i8, DType::i8}, {DType::bf16, DType::i8}};
  for (Isa isa : supported_isas()) {
    for (const auto& shape : shapes)
      for (const auto& kind : kinds)
        check(shape, kind[0], kind[1], isa, (&shape == shapes || &shape == shapes + 5) && &kind == kinds + 1);
    // The draw, with rows that end inside a vector.
    for (int n : {1, 15, 16, 17, 64, 65, 1500}) {
      std::vector<float> scores((n + 63) / 64 * 64, -INFINITY);
      for (int i = 0; i < n; ++i) scores[i] = float(i % 7);
      for (uint64_t i = 0; i < 50; ++i) {
        const int token = kernels_for(isa).draw(scores.data(), n, {i, i << 33, uint32_t(i)});
        assert(token >= 0 && token < n);
      }
    }
    check_rows(isa);
    check_vq_networks(isa);
    std::printf("%s ok\n", isa_name(isa));
  }
}
