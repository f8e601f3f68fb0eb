// Times passes of the CPU engine at fixed positions, phase by phase, beside the machine's read bandwidth. Build with
// -DFASTIGPT_PROFILE; see csrc/tests/build.sh.
//   bench_pass MODEL N WINDOW WEIGHTS CACHE ISA THREADS POSITION...
// MODEL: layers,heads,width; WEIGHTS, CACHE: float32, bfloat16 or int8
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

#define private public  // reaches the pass below the public interface
#include "fastigpt/decode.h"
#undef private
#include "engine/model.h"

namespace fastigpt { extern double profile_seconds[8]; }
using namespace fastigpt;
using Clock = std::chrono::steady_clock;
static double since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

// GB/s of all threads reading a buffer as large as the weights and caches, best of several.
static double read_bandwidth(SpinningPool& pool, size_t bytes) {
  Buffer b(bytes);
  const size_t words = bytes / 8 / pool.size();
  pool.run([&](int t) {
    for (size_t i = 0; i < words; i += 8) b.as<uint64_t>()[t * words + i] = i;
  });
  double best = 0;
  volatile uint64_t sink = 0;
  for (int round = 0; round < 5; ++round) {
    const auto start = Clock::now();
    pool.run([&](int t) {
      const uint64_t* p = b.as<uint64_t>() + t * words;
      uint64_t a[8] = {};
      for (size_t i = 0; i + 8 <= words; i += 8)
        for (int j = 0; j < 8; ++j) a[j] += p[i + j];
      sink = sink + a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
    });
    best = std::max(best, bytes / since(start) / 1e9);
  }
  return best;
}

int main(int argc, char** argv) {
  if (argc < 9)
    return std::printf("usage: bench_pass LAYERS,HEADS,WIDTH N WINDOW WEIGHTS CACHE ISA THREADS POSITION...\n"), 2;
  int layers, heads, width;
  if (std::sscanf(argv[1], "%d,%d,%d", &layers, &heads, &width) != 3) return 2;
  const int n = std::atoi(argv[2]), window = std::atoi(argv[3]);
  const ModelShape shape{layers, heads, heads, width / heads, width, 4 * width, 1024, 512, 1, 1, 1e-5f};
  CpuModel model(shape, parse_dtype("WEIGHTS", argv[4]), parse_dtype("CACHE", argv[5]), parse_isa(argv[6]),
                 std::atoi(argv[7]));
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 0.02f);
  std::vector<float> noise(4 * width * width + 1024 * width);
  for (auto& x : noise) x = normal(random);
  auto load = [&](const std::string& name, size_t count) { model.load(name, noise.data(), DType::f32, count); };
  load("prefix.embedding", width);
  load("token.embedding", 512 * width);
  load("positions", 1024 * width);
  load("norm", width);
  load("head.weight", 512 * width);
  for (int i = 0; i < layers; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    load(block + "norm_1", width);
    load(block + "norm_2", width);
    load(block + "qkv.weight", 3 * width * width);
    load(block + "proj.weight", width * width);
    load(block + "fc.weight", 4 * width * width);
    load(block + "out.weight", 4 * width * width);
  }
  const ModelImpl& m = *model.impl_;
  const int rows = n * window;
  Workspace ws(shape, m.kernels, m.weights, m.cache_shape(), rows, 1024, m.pool.size());
  KvCache kv(shape, m.cache, n, 1024);
  m.pool.run([&](int t) {  // touch the cache
    const size_t part = kv.memory.size() / m.pool.size();
    for (size_t i = 0; i < part; i += 64) kv.memory.as<>()[t * part + i] = 1;
  });
  const double gbs = read_bandwidth(m.pool, std::max<size_t>(256 << 20, model.weight_bytes()));
  std::printf("read bandwidth %.1f GB/s, weights %.1f MB, cache %.1f MB\n", gbs, model.weight_bytes() / 1e6,
              kv.memory.size() / 1e6);
  Pass pass{&ws, {}, {}, {}, layers, true};
  for (int arg = 8; arg < argc; ++arg) {
    const int position = std::atoi(argv[arg]);
    pass.clear();
    for (int i = 0; i < n; ++i) {
      pass.add({&kv, i, nullptr, 0, 0, position, window});
      for (int j = 0; j < window; ++j) pass.inputs.push_back(m.token((i * 7 + j) % 512, position + j));
    }
    for (int i = 0; i < 3; ++i) m.forward(pass);
    const auto start = Clock::now();
    int passes = 0;
    double best = 1e9, phases[8] = {};
    while (since(start) < 1.5 || passes < 5) {
      for (auto& s : profile_seconds) s = 0;
      const auto one = Clock::now();
      m.forward(pass);
      const double t = since(one);
      if (t < best) best = t, std::copy_n(profile_seconds, 8, phases);
      ++passes;
    }
    const double mean = since(start) / passes;
    const double cache = double(model.cache_bytes(1024)) / 1024 * (position + window) * n;
    const double bytes = model.weight_bytes() + cache;
    std::printf(
        "position %4d: %8.3f ms mean, %8.3f best; floor %7.3f ms by bytes: %3.0f%%; %6.1f GFLOP/s in linear layers\n",
        position, mean * 1e3, best * 1e3, bytes / gbs / 1e6, bytes / gbs / 1e9 / mean * 100,
        2.0 * (12.0 * layers * width * width + 512.0 * width) * rows /
            (phases[1] + phases[3] + phases[4] + phases[5] + phases[6]) / 1e9);
    const char* names[] = {"norm", "qkv", "attend", "proj", "fc", "out", "head"};
    const double w2 =
        double(width) * width * layers * model.weight_bytes() / (12.0 * layers * width * width + 512.0 * width);
    const double moved[] = {0, 3 * w2, cache, w2, 4 * w2, 4 * w2, 512.0 / width / layers * w2};
    for (int i = 0; i < 7; ++i)
      std::printf("  %s %.3f ms (%.1f GB/s)", names[i], phases[i] * 1e3,
                  phases[i] > 0 ? moved[i] / phases[i] / 1e9 : 0);
    std::printf("\n");
  }
}
