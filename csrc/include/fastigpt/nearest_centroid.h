// Nearest centroid: for every point the index of the closest row of a codebook. Pointers, sizes and strides only.
//
// The answer is that of real arithmetic on the stored values, ties to the lowest index, on every instruction set and
// for any number of threads (csrc/nearest/nearest_centroid.cpp says how). No N x K matrix is ever made.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "fastigpt/dtype.h"
#include "fastigpt/isa.h"

namespace fastigpt {

// Points of `dim` coordinates on a grid of any rank. Strides are in bytes and may be zero or negative.
struct PointsView {
  const void* data;
  DType dtype;  // u8, f16, bf16 or f32
  int64_t dim, dim_stride;
  std::vector<int64_t> shape, strides;

  int64_t size() const {
    int64_t n = 1;
    for (int64_t extent : shape) n *= extent;
    return n;
  }
};

// How the centroids are searched. All give the same indices; `automatic` takes what is fastest by what it has seen.
enum class SearchMethod {
  automatic,
  scan,     // every centroid, for a few points
  float32,  // every centroid, in two passes over a block of points
  int8,     // every centroid by an int8 score with a bound, the rest in float32 (AVX512-VNNI; at most 1024 dimensions)
  tree,     // at most 16 dimensions
  grid,     // 3 dimensions, at most 65536 centroids
  table     // uint8 points of 3 dimensions, not cosine, at most 65536 centroids
};

// A codebook made ready: any number of threads may search it at once. Parts are made when they are first worth it, in
// the thread that needs them.
class CentroidIndex {
 public:
  // centroids: [k, dim], finite, row-major; copied. cosine: points and centroids are divided by their lengths first (a
  // point of length zero gets index 0, distance 1).
  CentroidIndex(const float* centroids, int64_t k, int64_t dim, bool cosine);
  ~CentroidIndex();

  // Is this what the index was made of, bit for bit?
  bool holds(const float* centroids) const;
  void copy(float* centroids) const;  // what it was made of
  // indices: [points.size()]; distances: the same, squared, or null. Returns the position of a point that is not finite
  // (the outputs are then meaningless), else -1. Throws std::invalid_argument for a method that cannot be had here.
  int64_t search(const PointsView& points, int64_t* indices, float* distances, Isa isa, int threads,
                 SearchMethod method = SearchMethod::automatic) const;
  int64_t bytes() const;  // that it takes by now

 private:
  struct Asked;
  struct Way;
  struct Parts;
  class Worker;
  std::unique_ptr<Parts> parts_;
};

// The nearest centroid of each of the 2^24 colours, worked out once: 256^3 colours in cells of 4^3; `cells` says where
// the 64 answers of a cell begin in `blocks`, whose first k blocks are uniform, one for each centroid. About 15 MB,
// exact. A colour (r, g, b) stands for the point (levels[r], levels[256 + g], levels[512 + b]), which must rise or fall
// with the level along each axis; k is at most 65536.
class RgbTable {
 public:
  RgbTable(const double* centroids, int64_t k, const double* levels, Isa isa, int threads);
  // points: u8, dim 3.
  void lookup(const PointsView& points, int64_t* indices, int threads) const;
  int64_t bytes() const { return bytes_; }
  static constexpr int64_t kCells = 1 << 18, kCellSize = 64;
  const uint32_t* cells() const { return cells_; }    // [kCells]
  const uint16_t* blocks() const { return blocks_; }  // [n_blocks()]
  int64_t n_blocks() const { return (bytes_ - kCells * 4) / 2; }

 private:
  std::unique_ptr<char[]> memory_;
  uint32_t* cells_;
  uint16_t* blocks_;
  int64_t bytes_;
};

// On the GPU. All pointers are the device's; `stream` is a cudaStream_t, and the work is only enqueued on it: nothing
// is allocated and nothing waits. At most kMaxAxes axes in points.shape. Return null, or what CUDA has to complain
// about.
constexpr int kMaxAxes = 3;

// Float32 fused multiply-adds; where the two least distances are too close for float32, float64. A point whose
// distances are not finite gets index -1 and distance NaN. distances may be null.
const char* nearest_centroid_cuda(const PointsView& points, const float* centroids, int64_t k, int64_t* indices,
                                  float* distances, void* stream);
// cells, blocks: copies of an RgbTable's. points: u8, dim 3.
const char* rgb_lookup_cuda(const PointsView& points, const uint32_t* cells, const uint16_t* blocks, int64_t* indices,
                            void* stream);

}  // namespace fastigpt
