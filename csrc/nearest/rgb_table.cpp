// The exact table of all 2^24 colours: how it is made, and how pixels are looked up in it.
//
// Making: boxes of colours are split along each axis, 256 -> 64 -> 16 -> 8, and each box keeps the centroids that can
// win somewhere inside it. A box with one centroid left needs no further work. The colours of the others are decided in
// float32, those whose two best are too close for that in float64, and in exact arithmetic; ties by the lower index.
//
// Looking up: a pixel costs two loads, the second somewhere in 15 MB, so pixels go in batches: all addresses first,
// each prefetched, and the answers one batch later.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "fastigpt/nearest_centroid.h"
#include "nearest/codebook.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastigpt {
namespace {

constexpr int64_t kCells = RgbTable::kCells, kCellSize = RgbTable::kCellSize;
constexpr int kBatch = 64;

// Position of a colour: cell (6 bits of each channel), then the place inside it (2 bits of each).
inline uint32_t place(uint32_t r, uint32_t g, uint32_t b) {
  return (r >> 2) << 18 | (g >> 2) << 12 | (b >> 2) << 6 | (r & 3) << 4 | (g & 3) << 2 | (b & 3);
}

inline void prefetch(const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

struct Builder {
  const double* levels;  // [3, 256]
  uint32_t* cells;
  uint16_t* blocks;
  BoxWork work;
  std::atomic<int64_t> used;  // blocks

  double level(int axis, int i) const { return levels[256 * axis + i]; }

  // The candidates of `box` that can win in the box of `edge` levels beginning at `low`.
  void keep(const Candidates& box, const int* low, int edge, Candidates& kept) const {
    double middle[3], half[3];
    for (int d = 0; d < 3; ++d) {
      const double begin = level(d, low[d]), end = level(d, low[d] + edge - 1);
      middle[d] = 0.5 * (begin + end);
      half[d] = 0.5 * std::abs(end - begin) * (1 + 1e-12);
    }
    work.keep(box, middle, half, kept);
  }

  // The nearest of the candidates to one colour, without rounding.
  uint16_t decide(const Candidates& box, const double* x) const {
    int64_t nearest = 0;
    for (int64_t c = 1; c < box.count; ++c) {
      const double here[3] = {box.at[0][c], box.at[1][c], box.at[2][c]};
      const double least[3] = {box.at[0][nearest], box.at[1][nearest], box.at[2][nearest]};
      if (clearly(x, here, least) || (!clearly(x, least, here) && exactly_nearer(x, here, least, 3))) nearest = c;
    }
    return uint16_t(box.index[nearest]);
  }

  // |x - a| < |x - b|, and float64 can tell.
  static bool clearly(const double* x, const double* a, const double* b) {
    double da = 0, db = 0;
    for (int d = 0; d < 3; ++d) da += (x[d] - a[d]) * (x[d] - a[d]), db += (x[d] - b[d]) * (x[d] - b[d]);
    return db - da > 1e-14 * db;
  }

  // The eight cells of a box of eight levels that begins at `low`.
  void fill(const Candidates& box, const int* low) {
    const double* const axes[3] = {levels + low[0], levels + 256 + low[1], levels + 512 + low[2]};
    uint16_t answers[8][kCellSize];
    uint64_t close[8];
    work.fill(box, axes, answers[0], close);
    for (int cell = 0; cell < 8; ++cell) {
      const int r = cell >> 2 << 2, g = (cell >> 1 & 1) << 2, b = (cell & 1) << 2;
      for (int at = 0; close[cell]; ++at, close[cell] >>= 1) {
        if (!(close[cell] & 1)) continue;
        const double x[3] = {axes[0][r + at / 16], axes[1][g + at / 4 % 4], axes[2][b + at % 4]};
        answers[cell][at] = decide(box, x);
      }
      const uint16_t first = answers[cell][0];
      uint16_t differs = 0;
      for (uint16_t answer : answers[cell]) differs |= answer ^ first;
      uint32_t start = uint32_t(first * kCellSize);
      if (differs) {
        start = uint32_t(used++ * kCellSize);
        std::memcpy(blocks + start, answers[cell], sizeof answers[cell]);
      }
      cells[place(low[0] + r, low[1] + g, low[2] + b) / kCellSize] = start;
    }
  }

  // Cells inside the box of `edge` levels that begins at `low`. scratch[0] serves this split, the rest the deeper ones.
  void split(const Candidates& box, const int* low, int edge, Candidates* scratch) {
    if (box.count == 1) {
      const auto start = uint32_t(box.index[0] * kCellSize);
      for (int r = low[0]; r < low[0] + edge; r += 4)
        for (int g = low[1]; g < low[1] + edge; g += 4)
          for (int b = low[2]; b < low[2] + edge; b += 4) cells[place(r, g, b) / kCellSize] = start;
      return;
    }
    if (edge == 8) return fill(box, low);
    const int child = edge > 16 ? edge / 4 : edge / 2;
    for (int r = low[0]; r < low[0] + edge; r += child)
      for (int g = low[1]; g < low[1] + edge; g += child)
        for (int b = low[2]; b < low[2] + edge; b += child) {
          const int corner[3] = {r, g, b};
          keep(box, corner, child, scratch[0]);
          split(scratch[0], corner, child, scratch + 1);
        }
  }
};

}  // namespace

RgbTable::RgbTable(const double* centroids, int64_t k, const double* levels, Isa isa, int threads) {
  constexpr int64_t kPage = 2 << 20;
  bytes_ = kPage + kCells * 4 + (kCells + k) * kCellSize * 2;  // most of it is never touched
  memory_.reset(new char[bytes_]);
  char* const aligned =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.get()) + kPage - 1) & ~uintptr_t(kPage - 1));
#ifdef __linux__
  madvise(aligned, size_t(bytes_ - kPage), MADV_HUGEPAGE);
#endif
  cells_ = reinterpret_cast<uint32_t*>(aligned);
  blocks_ = reinterpret_cast<uint16_t*>(aligned + kCells * 4);

  for (int64_t i = 0; i < k; ++i) std::fill_n(blocks_ + i * kCellSize, kCellSize, uint16_t(i));
  const Candidates all = without_repeats(centroids, k);
  Builder builder{levels, cells_, blocks_, box_work(isa), {k}};
  parallel(64, threads, [&](int64_t i) {
    std::vector<Candidates> scratch(4, Candidates(all.count));
    const int low[3] = {int(i / 16 * 64), int(i / 4 % 4 * 64), int(i % 4 * 64)};
    builder.keep(all, low, 64, scratch[0]);
    builder.split(scratch[0], low, 64, &scratch[1]);
  });
  bytes_ = kCells * 4 + builder.used * kCellSize * 2;
}

void RgbTable::lookup(const PointsView& points, int64_t* indices, int threads) const {
  const int64_t n = points.size();
  const int64_t width = points.shape.empty() ? 1 : points.shape.back();
  const int64_t step = points.shape.empty() ? 0 : points.strides.back(), channel = points.dim_stride;
  const int rank = int(points.shape.size());
  const uint32_t* const cells = cells_;
  const uint16_t* const blocks = blocks_;

  // Where the answers to pixels [first, first + count) will be; prefetches them.
  const auto locate = [&](int64_t first, int count, uint32_t* where) {
    for (int done = 0; done < count;) {
      int64_t rest = first + done;
      const int64_t column = rest % width;
      rest /= width;
      const uint8_t* p = static_cast<const uint8_t*>(points.data) + column * step;
      for (int axis = rank - 2; axis >= 0; --axis) {
        p += rest % points.shape[axis] * points.strides[axis];
        rest /= points.shape[axis];
      }
      const int run = int(std::min<int64_t>(count - done, width - column));
      if (step == 3 && channel == 1) {
        for (int i = 0; i < run; ++i, p += 3) where[done + i] = place(p[0], p[1], p[2]);
      } else {
        for (int i = 0; i < run; ++i, p += step) where[done + i] = place(p[0], p[channel], p[2 * channel]);
      }
      done += run;
    }
    for (int i = 0; i < count; ++i) {
      where[i] = cells[where[i] / kCellSize] + where[i] % kCellSize;
      prefetch(blocks + where[i]);
    }
  };
  constexpr int64_t kChunk = 1 << 14;
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  // A thread takes some 20 us to wake, in which this one looks up about 8,000 pixels.
  parallel(chunks, int(std::min<int64_t>(threads, 1 + n / 32768)), [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk, end = std::min(n, begin + kChunk);
    uint32_t where[2][kBatch];
    int ready = int(std::min<int64_t>(kBatch, end - begin));
    locate(begin, ready, where[0]);
    for (int64_t at = begin, turn = 0; at < end; turn ^= 1) {
      const int following = int(std::min<int64_t>(kBatch, end - at - ready));
      if (following > 0) locate(at + ready, following, where[turn ^ 1]);
      for (int i = 0; i < ready; ++i) indices[at + i] = blocks[where[turn][i]];
      at += ready;
      ready = following;
    }
  });
}

}  // namespace fastigpt
