// What nearest centroid's parts share: the codebook in the layouts that the kernels read, and a block of points on its
// way through.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "fastigpt/isa.h"
#include "fastigpt/nearest_centroid.h"

namespace fastigpt {

constexpr int kBlock = 64;  // points worked on at once

// Arrays that begin at a cache line, so that no vector lies across two. What is not given a value has none.
template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  template <class U, class... Values>
  void construct(U* p, Values&&... values) {
    if constexpr (sizeof...(Values) == 0)
      ::new (static_cast<void*>(p)) U;
    else
      ::new (static_cast<void*>(p)) U(std::forward<Values>(values)...);
  }
  template <class U>
  bool operator==(const LineAllocator<U>&) const {
    return true;
  }
  template <class U>
  bool operator!=(const LineAllocator<U>&) const {
    return false;
  }
};
template <class T>
using Lines = std::vector<T, LineAllocator<T>>;

struct Codebook {
  Codebook(const float* centroids, int64_t k, int64_t dim, bool cosine);

  int64_t k, dim;
  double tolerance;         // relative: two float64 distances closer than this are compared exactly
  float float32_tolerance;  // relative rounding error of two float32 distances, with room
  std::vector<float> rows;  // [k, dim], of length 1 for cosine
  std::vector<float> mean;  // [dim]
  float largest = 0;        // |coordinate|
};

// For the float32 pass: centred on the mean and in tiles of four, and as they came in columns for the float64 pass.
// Both are cut into the same groups.
struct Tiles {
  static constexpr int kTile = 4, kStep = 16, kMaxGroups = 128;

  explicit Tiles(const Codebook& book);
  int64_t bytes() const { return int64_t(tiles.size() + columns.size()) * 4; }

  int64_t group, n_groups;
  double radius2;        // largest |c - mean|^2
  Lines<float> tiles;    // [n_groups * group / 4, 1 + dim, 4]: |c'|^2, then -2 c'; padding has norm infinity
  Lines<float> columns;  // [n_groups, dim, group]
};

// 16 centroids to a leaf, in columns. Empty slots have index -1 and lie at infinity.
struct Leaves {
  static constexpr int kWidth = 16;
  Leaves() = default;
  explicit Leaves(const Codebook& book);  // in order
  int64_t bytes() const { return int64_t(columns.size() + index.size()) * 4; }
  int64_t size() const { return int64_t(index.size()) / kWidth; }

  Lines<float> columns;        // [n, dim, 16]
  std::vector<int32_t> index;  // [n, 16]

  void resize(int64_t n, int64_t dim);
  void set(int64_t leaf, int64_t slot, int64_t dim, int32_t centroid, const float* row);
};

// The codebook in int8, for scores that rule out most centroids (int8_book.cpp: the bound and its proof). A group is a
// leaf of `leaves`.
struct Int8Book {
  static constexpr int64_t kGroup = Leaves::kWidth, kMaxDim = 1024;

  Int8Book(const Codebook& book, const Leaves& leaves);
  bool usable() const { return scale > 0; }
  int64_t bytes() const { return int64_t(panels.size()) + int64_t(first_terms.size() + corrections.size()) * 4; }

  int64_t n_groups, quads;     // quads: of dimensions, ceil(dim / 4)
  float scale = 0;             // c - mean is nearly scale * q; 0 where the coordinates are too large or small
  double error, largest;       // bounds of |f| = |c - mean - scale q| and of the scores' first terms
  Lines<int8_t> panels;        // [n_groups, quads, 16, 4]: -q
  Lines<float> first_terms;    // [n_groups, 16]: |c - mean|^2 / 2 - (c - mean).f
  Lines<int32_t> corrections;  // [n_groups, 16]: 128 times the sum of q; padding: kPadding
  static constexpr int32_t kPadding = 1 << 30;
};

// A group and the points of a block, one bit each, for which a centroid of it may win.
struct Survivor {
  int64_t group;
  uint64_t points;
};

// Memory of one thread for blocks searched by int8.
struct Int8Scratch {
  explicit Int8Scratch(const Int8Book& book);

  Lines<int32_t> minima;      // [n_groups, kBlock]
  Lines<Survivor> survivors;  // [n_groups]
  Lines<uint8_t> bytes;       // [quads, kBlock, 4]
};

// Centroids that can win in a box of three dimensions, with their coordinates, in rising order of index.
struct Candidates {
  int64_t count = 0;
  Lines<int32_t> index;                  // [capacity]
  Lines<double> at[3], distance, reach;  // the same

  explicit Candidates(int64_t capacity);
  void add(int32_t i, double x, double y, double z);
};

// The candidates of `box` that can win somewhere within half[d] of middle[d], and the nearest of a box's candidates for
// 8^3 points: cell_impl.h.
struct BoxWork {
  void (*keep)(const Candidates& box, const double* middle, const double* half, Candidates& kept);
  void (*fill)(const Candidates& box, const double* const* axes, uint16_t* answers, uint64_t* close);
};
BoxWork box_work(Isa isa);

// All centroids of three dimensions; of equal ones only the first, the others cannot win.
Candidates without_repeats(const double* centroids, int64_t k);

// The codebook for three dimensions: cells of a cube, each with the centroids that can win inside it.
struct Grid {
  static constexpr int kMaxCentroids = 65536, kWidth = 8;

  // The first eight of a cell's centroids, at infinity where there are fewer. What is left over begins at leaf `first`
  // of `rest`.
  struct alignas(64) Cell {
    float at[3][kWidth];
    uint16_t index[kWidth];
    int32_t first, count;
  };

  Grid(const Codebook& book, Isa isa, int threads);
  bool usable() const { return side > 0; }
  int64_t bytes() const { return int64_t(cells.size() * sizeof(Cell)) + rest.bytes(); }

  int side = 0;            // cells along an edge; 0 where coordinates are too large or small
  float low[3], scale[3];  // cell of x: (x - low) * scale, in [0, side)
  std::vector<Cell> cells;
  Leaves rest;
};

// The codebook for few dimensions: leaves cut by a k-d tree, and 16 leaves to a branch, with the boxes that hold them.
// Empty boxes are infinitely far.
struct Tree {
  static constexpr int kWidth = Leaves::kWidth, kMaxDim = 16;

  explicit Tree(const Codebook& book);
  int64_t bytes() const { return leaves.bytes() + int64_t(leaf_boxes.size() + branch_boxes.size()) * 4; }

  int64_t n_branches;         // rounded up to a multiple of kWidth
  Leaves leaves;              // [n_branches * 16]
  Lines<float> leaf_boxes;    // [n_branches, 2 (low, high), dim, 16]
  Lines<float> branch_boxes;  // [n_branches / 16, 2, dim, 16]
};

// A part of an index that is made when it is first worth it. Two threads may make it at once, and one of them is kept:
// no lock, so that a forked child never waits for a thread that is not there.
template <class Part>
class Lazy {
 public:
  Lazy() = default;
  Lazy(const Lazy&) = delete;
  Lazy& operator=(const Lazy&) = delete;
  ~Lazy() { delete part_.load(); }

  const Part* get() const { return part_.load(std::memory_order_acquire); }
  template <class... Arguments>
  const Part* make(const Arguments&... arguments) {
    if (const Part* made = get()) return made;
    auto fresh = std::make_unique<Part>(arguments...);
    Part* expected = nullptr;
    return part_.compare_exchange_strong(expected, fresh.get()) ? fresh.release() : expected;
  }

 private:
  std::atomic<Part*> part_{nullptr};
};

double direct_distance(const float* x, const float* c, int64_t dim);

// Is centroid a of the codebook nearer to x than b, or as near and of lower index?
bool beats(const float* rows, const float* x, int64_t dim, int64_t a, int64_t b);

// A block of the float32 pass.
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

// Divides a row by its length, in float64; false for one of length zero.
bool normalise(float* row, int64_t dim);

// |x - a| < |x - b| in real arithmetic.
bool exactly_nearer(const double* x, const double* a, const double* b, int64_t dim);

// Runs task(i) for i in [0, n) on up to `threads` threads, this one among them. Throws what a task threw first; then
// others may be left out.
void parallel(int64_t n, int threads, const std::function<void(int64_t)>& task);

// nearest: brute force in float32 over a block. search: by the tree, points [count, dim]; returns the leaves it opened.
// scan: all leaves. boxes: see BoxWork.
#define FASTIGPT_SEARCHES(isa)                                                                            \
  namespace nearest_##isa {                                                                               \
    void nearest(const Codebook& book, const Tiles& tiles, const Block& block);                           \
    int64_t search(const Codebook& book, const Tree& tree, const float* points, int count, int64_t* out); \
    void scan(const Codebook& book, const Leaves& leaves, const float* points, int count, int64_t* out);  \
    extern const BoxWork boxes;                                                                           \
  }
FASTIGPT_SEARCHES(generic)
FASTIGPT_SEARCHES(avx2)
FASTIGPT_SEARCHES(avx512)
#undef FASTIGPT_SEARCHES

// By the grid, and by the tree for points outside it. A cell is eight wide, so there is nothing for AVX-512 to do.
#define FASTIGPT_GRID(isa)                                                                                 \
  namespace nearest_##isa {                                                                                \
    void in_grid(const Codebook& book, const Grid& grid, const Tree& tree, const float* points, int count, \
                 int64_t* out);                                                                            \
  }
FASTIGPT_GRID(generic)
FASTIGPT_GRID(avx2)
#undef FASTIGPT_GRID

// By int8 scores first. False, and nothing done, where they leave too many centroids: then another way is faster.
namespace nearest_avx512vnni {
bool bounded(const Codebook& book, const Int8Book& quantised, const Leaves& leaves, Int8Scratch& scratch,
             const float* points, int count, int64_t* out);
}

}  // namespace fastigpt
