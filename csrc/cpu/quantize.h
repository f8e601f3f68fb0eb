// What nearest_centroid's parts share: the codebook laid out for the kernels, and a block of points on its way through.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "fastigpt/quantize.h"

namespace fastigpt {

constexpr int kBlock = 64;  // points worked on at once

// Centroids are kept twice: centred on their mean and in tiles of four for the float32 pass, as they came and in columns
// for the float64 pass. Both are cut into the same groups.
struct Codebook {
  static constexpr int kTile = 4, kStep = 16, kMaxGroups = 128;

  Codebook(const float* centroids, int64_t k, int64_t dim, bool cosine);

  int64_t k, dim, group, n_groups;
  double tolerance;            // relative: two float64 distances closer than this are compared exactly
  double radius2;              // largest |c - mean|^2
  std::vector<float> rows;     // [k, dim]
  std::vector<float> mean;     // [dim]
  std::vector<float> tiles;    // [n_groups * group / 4, 1 + dim, 4]: |c'|^2, then -2 c'; padding has norm infinity
  std::vector<float> columns;  // [n_groups, dim, group]
};

struct Block {
  int count;            // points in use
  const float* rows;    // [kBlock, dim]
  const float* centred; // [dim, kBlock]
  const float* slack;   // [kBlock] twice the rounding error that |c'|^2 - 2 x'.c' can have in float32
  float* group_min;     // [n_groups, kBlock]
  float* low;           // [kBlock]
  int64_t* index;       // [kBlock]
  double* distance;     // [kBlock]

  // Centroid j stands at float64 distance d2, not clearly above the best so far: does it win?
  void challenge(const Codebook& book, int p, int64_t j, double d2) const;
};

// Copies points [first, first + count) to out as [count, dim], widened to float32.
void gather(const PointsView& points, int64_t first, int count, float* out);

// An unevaluated sum of two float64: about 106 bits.
struct Double2 {
  double hi, lo;
  void add(double x);
  bool operator<(const Double2& other) const;
};
Double2 exact_distance(const double* x, const double* c, int64_t dim);

// Runs task(i) for i in [0, n) on up to `threads` threads, this one among them.
void parallel(int64_t n, int threads, const std::function<void(int64_t)>& task);

namespace quantize_generic { void nearest(const Codebook&, const Block&); }
namespace quantize_avx2 { void nearest(const Codebook&, const Block&); }
namespace quantize_avx512 { void nearest(const Codebook&, const Block&); }

}  // namespace fastigpt
