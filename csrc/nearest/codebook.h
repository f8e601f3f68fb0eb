// What nearest_centroid's parts share: the codebook laid out for the kernels, and a block of points on its way through.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "fastigpt/nearest_centroid.h"

namespace fastigpt {

constexpr int kBlock = 64;  // points worked on at once

// Centroids are kept twice: centred on their mean and in tiles of four for the float32 pass, as they came and in
// columns for the float64 pass. Both are cut into the same groups.
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

// 16 centroids to a leaf, in columns. Empty slots have index -1 and lie at infinity.
struct Leaves {
  static constexpr int kWidth = 16;
  std::vector<float> columns;  // [n, dim, 16]
  std::vector<int32_t> index;  // [n, 16]

  void resize(int64_t n, int64_t dim);
  void set(int64_t leaf, int64_t slot, int64_t dim, int32_t centroid, const float* row);
};

// Centroids that can win in a box of three dimensions, with their coordinates, in rising order of index.
struct Candidates {
  std::vector<int32_t> index;
  std::vector<double> at[3], distance;

  void add(int32_t i, double x, double y, double z);
  // The candidates of `box` that can win somewhere within half[d] of middle[d] become this list.
  void keep(const Candidates& box, const double* middle, const double* half);
};

// The codebook for three dimensions: 16^3 cells, each with the leaves of the centroids that can win inside it.
struct Grid {
  static constexpr int kSide = 16;

  Grid(const float* rows, int64_t k);
  bool usable() const { return !start.empty(); }

  float low[3], scale[3];      // cell of x: (x - low) * scale, in [0, 16)
  std::vector<int32_t> start;  // [16^3 + 1], first leaf of each cell; empty where coordinates are too large or small
  Leaves leaves;
};

// The codebook for few dimensions: leaves cut by a k-d tree, and 16 leaves to a branch, with the boxes that hold them.
// Empty boxes are infinitely far.
struct Tree {
  static constexpr int kWidth = Leaves::kWidth, kMaxDim = 16;

  Tree(const std::vector<float>& rows, int64_t k, int64_t dim);

  int64_t dim, n_branches;          // n_branches: rounded up to a multiple of kWidth
  float tolerance;                  // relative rounding error of two float32 distances, with room
  const float* rows;                // [k, dim], the codebook's
  Leaves leaves;                    // [n_branches * 16]
  std::vector<float> leaf_boxes;    // [n_branches, 2 (low, high), dim, 16]
  std::vector<float> branch_boxes;  // [n_branches / 16, 2, dim, 16]
  std::unique_ptr<Grid> grid;       // used first where there is one
};

double direct_distance(const float* x, const float* c, int64_t dim);

// Is centroid a of the codebook nearer to x than b, or as near and of lower index?
bool beats(const float* rows, const float* x, int64_t dim, int64_t a, int64_t b);

struct Block {
  int count;             // points in use
  const float* rows;     // [kBlock, dim]
  const float* centred;  // [dim, kBlock]
  const float* slack;    // [kBlock] twice the rounding error that |c'|^2 - 2 x'.c' can have in float32
  float* group_min;      // [n_groups, kBlock]
  float* low;            // [kBlock]
  int64_t* index;        // [kBlock]
  double* distance;      // [kBlock]

  // Centroid j stands at float64 distance d2, not clearly above the best so far: does it win?
  void challenge(const Codebook& book, int p, int64_t j, double d2) const;
};

// Copies points [first, first + count) to out as [count, dim], widened to float32.
void gather(const PointsView& points, int64_t first, int count, float* out);

// |x - a| < |x - b| in real arithmetic.
bool exactly_nearer(const double* x, const double* a, const double* b, int64_t dim);

// Runs task(i) for i in [0, n) on up to `threads` threads, this one among them. Throws what a task threw first; then
// others may be left out.
void parallel(int64_t n, int threads, const std::function<void(int64_t)>& task);

// nearest: brute force over a block. search: the same by the tree, points [count, dim]; returns the leaves it opened.
#define FASTIGPT_SEARCHES(isa)                                                        \
  namespace nearest_##isa {                                                           \
    void nearest(const Codebook& book, const Block& block);                           \
    int64_t search(const Tree& tree, const float* points, int count, int64_t* index); \
  }
FASTIGPT_SEARCHES(generic)
FASTIGPT_SEARCHES(avx2)
FASTIGPT_SEARCHES(avx512)
#undef FASTIGPT_SEARCHES

}  // namespace fastigpt
