// Read bandwidth of the machine: the yardstick that engines are measured against.
#include "fastigpt/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>

#include "runtime/helpers.h"

namespace fastigpt {
namespace {

std::uint64_t sum(const std::uint64_t* data, std::size_t count) {
  // Four sums, so that additions don't wait for each other.
  std::uint64_t a = 0, b = 0, c = 0, d = 0;
  for (std::size_t i = 0; i + 32 <= count; i += 32)
    for (std::size_t j = 0; j < 8; ++j) {
      a += data[i + j];
      b += data[i + 8 + j];
      c += data[i + 16 + j];
      d += data[i + 24 + j];
    }
  return a + b + c + d;
}

}  // namespace

std::vector<double> read_bandwidth(std::size_t bytes, int threads, int repeats) {
  const std::size_t count = bytes / sizeof(std::uint64_t);
  std::unique_ptr<std::uint64_t[]> data(new std::uint64_t[count]);
  for (std::size_t i = 0; i < count; ++i) data[i] = i;  // touched, so that every page is there
  constexpr std::size_t kPart = std::size_t(1) << 17;   // a megabyte at a time
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(threads));
  std::vector<double> rates;
  for (int r = 0; r < repeats; ++r) {
    const auto start = std::chrono::steady_clock::now();
    std::atomic<std::size_t> next{0};
    share(threads, [&](int thread) {
      for (std::size_t first; (first = next.fetch_add(kPart)) < count;)
        sums[static_cast<std::size_t>(thread)] += sum(data.get() + first, std::min(kPart, count - first));
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    rates.push_back(static_cast<double>(count * sizeof(std::uint64_t)) / seconds.count());
  }
  volatile std::uint64_t keep = 0;  // the sums are needed, or the loop would be dropped
  for (auto s : sums) keep = keep + s;
  return rates;
}

}  // namespace fastigpt
