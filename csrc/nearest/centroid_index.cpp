// CentroidIndex: which of its ways a search takes, block of 64 points by block, and the parts it needs for them.
//
// Every way is exact, so the choice is one of time alone. A grid, a tree or a table costs milliseconds, so it is made
// when as many points have been searched for as would have paid for it. Whether the tree rules out enough is only seen
// while searching: it counts the leaves it opens, over the life of the index.
//
// In float32, by brute force, in two passes. The first finds, in the cheap form |c|^2 - 2 x.c, the smallest value in
// each group of centroids. Its rounding error has a bound, so every centroid that could be nearest lies in a group
// whose smallest value is within that bound of the overall smallest: nearly always one group. The second pass looks
// into those groups with direct float64 distances, and where two of them are too close for float64, in exact
// arithmetic. Points and centroids are centred on the codebook's mean first, which keeps the bound small wherever the
// data lie.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>

#include "fastigpt/nearest_centroid.h"
#include "nearest/codebook.h"

namespace fastigpt {

// Which method the caller asked for.
struct CentroidIndex::Asked {
  SearchMethod method;
  bool automatic() const { return method == SearchMethod::automatic; }
  bool wants(SearchMethod which, bool possible) const {
    if (method == which && !possible) throw std::invalid_argument("this method cannot search these points");
    return method == which;
  }
};

// The parts that the blocks of one call go through; null: not this one.
struct CentroidIndex::Way {
  const Grid* grid = nullptr;
  const Tree* tree = nullptr;
  const Leaves* leaves = nullptr;
  const Int8Book* quantised = nullptr;
  bool scanned = false;  // leaf by leaf
};

struct CentroidIndex::Parts {
  Parts(const float* centroids, int64_t k, int64_t dim, bool cosine) : book(centroids, k, dim, cosine), cosine(cosine) {
    if (cosine) given.assign(centroids, centroids + k * dim);
  }
  const std::vector<float>& original() const { return cosine ? given : book.rows; }
  double brute_cost(const Int8Book* quantised) const;
  const RgbTable* table_for(const PointsView& points, double seen, const Asked& asked, Isa isa, int threads);
  Way way_for(const PointsView& points, double seen, const Asked& asked, Isa isa, int threads);

  Codebook book;
  bool cosine;
  std::vector<float> given;  // [k, dim], where rows are not that
  Lazy<Tiles> tiles;
  Lazy<Leaves> leaves;
  Lazy<Int8Book> int8;
  Lazy<Tree> tree;
  Lazy<Grid> grid;
  Lazy<RgbTable> table;
  std::atomic<int64_t> seen{0};                   // points
  std::atomic<int64_t> opened{0}, by_tree{0};     // leaves, points
  std::atomic<int64_t> bounded{0}, unbounded{0};  // blocks that int8 could and could not do
};

namespace {

constexpr double kEpsilon = 1.0 / (1 << 24);  // unit roundoff of float32

struct Searches {
  void (*nearest)(const Codebook&, const Tiles&, const Block&);
  int64_t (*search)(const Codebook&, const Tree&, const float*, int, int64_t*);
  void (*scan)(const Codebook&, const Leaves&, const float*, int, int64_t*);
  void (*in_grid)(const Codebook&, const Grid&, const Tree&, const float*, int, int64_t*);
};

Searches searches_of(Isa isa) {
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
  using namespace nearest_avx2;
  if (isa >= Isa::avx512) return {nearest_avx512::nearest, nearest_avx512::search, nearest_avx512::scan, in_grid};
  if (isa == Isa::avx2) return {nearest, search, scan, in_grid};
#endif
  (void)isa;
  return {nearest_generic::nearest, nearest_generic::search, nearest_generic::scan, nearest_generic::in_grid};
}

bool bound_search(const Codebook& book, const Int8Book& quantised, const Leaves& leaves, Int8Scratch& scratch,
                  const float* points, int count, int64_t* out) {
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
  return nearest_avx512vnni::bounded(book, quantised, leaves, scratch, points, count, out);
#else
  return (void)book, (void)quantised, (void)leaves, (void)scratch, (void)points, (void)count, (void)out, false;
#endif
}

// Position of the first of `count` rows that is not finite, or -1.
int first_not_finite(const float* rows, int count, int64_t dim) {
  constexpr int64_t kSums = 16;  // in turn, so that none waits for itself
  float sums[kSums] = {};
  const int64_t n = count * dim;
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int64_t s = 0; s < kSums; ++s) sums[s] += rows[i + s] * 0;
  for (; i < n; ++i) sums[0] += rows[i] * 0;
  float sum = 0;
  for (float s : sums) sum += s;
  if (sum == 0) return -1;
  for (i = 0;; ++i)
    if (!std::isfinite(rows[i])) return int(i / dim);
}

// Buffers of one thread for the float32 pass.
struct BlockBuffers {
  BlockBuffers(const Codebook& book, const Tiles& tiles)
      : centred(kBlock * book.dim), slack(kBlock), low(kBlock), group_min(kBlock * tiles.n_groups) {}
  Lines<float> centred, slack, low, group_min;
  int64_t index[kBlock];
  double distance[kBlock];
};

// Centres the block's points and bounds the error of the first pass.
void centre(const Codebook& book, const Tiles& tiles, const float* rows, int count, BlockBuffers& w) {
  const double radius = std::sqrt(tiles.radius2);
  for (int p = 0; p < kBlock; ++p) {
    double norm2 = 0;
    for (int64_t d = 0; d < book.dim; ++d) {
      const float x = p < count ? rows[p * book.dim + d] - book.mean[d] : 0;
      w.centred[d * kBlock + p] = x;
      norm2 += double(x) * x;
    }
    const double size = tiles.radius2 + 2 * radius * std::sqrt(norm2);
    w.slack[p] =
        size < 1e37 ? float(2.1 * (book.dim + 10) * kEpsilon * size + 1e-36) : std::numeric_limits<float>::infinity();
    w.index[p] = 0;
    w.distance[p] = std::numeric_limits<double>::infinity();
  }
}

// Nanoseconds that a point costs one thread, roughly, on a processor of 2024: to choose a way and a number of threads.
double scan_cost(const Codebook& book) { return double(book.k) * double(book.dim + 2) / 25; }
double int8_cost(const Codebook& book) { return double(book.k) * (double((book.dim + 3) / 4) + 1.5) / 120 + 100; }
double leaf_cost(const Codebook& book) { return 2.2 * double(book.dim) + 8; }
constexpr double kGridCost = 8;
constexpr int kFew = 8;  // points of a block that do not fill the vectors of the other ways

}  // namespace

void Block::challenge(const Codebook& book, int p, int64_t j, double d2) const {
  const bool close = d2 >= distance[p] * (1 - book.tolerance) && distance[p] < std::numeric_limits<double>::infinity();
  if (close && !beats(book.rows.data(), rows + p * book.dim, book.dim, j, index[p])) return;
  distance[p] = d2;
  index[p] = j;
}

CentroidIndex::CentroidIndex(const float* centroids, int64_t k, int64_t dim, bool cosine)
    : parts_(std::make_unique<Parts>(centroids, k, dim, cosine)) {}

CentroidIndex::~CentroidIndex() = default;

bool CentroidIndex::holds(const float* centroids) const {
  const std::vector<float>& own = parts_->original();
  return std::memcmp(own.data(), centroids, own.size() * sizeof(float)) == 0;
}

void CentroidIndex::copy(float* centroids) const {
  std::copy(parts_->original().begin(), parts_->original().end(), centroids);
}

int64_t CentroidIndex::bytes() const {
  const Parts& parts = *parts_;
  int64_t sum = int64_t(parts.book.rows.size() + parts.given.size()) * 4;
  if (const Tiles* part = parts.tiles.get()) sum += part->bytes();
  if (const Leaves* part = parts.leaves.get()) sum += part->bytes();
  if (const Int8Book* part = parts.int8.get()) sum += part->bytes();
  if (const Tree* part = parts.tree.get()) sum += part->bytes();
  if (const Grid* part = parts.grid.get()) sum += part->bytes();
  if (const RgbTable* part = parts.table.get()) sum += part->bytes();
  return sum;
}

double CentroidIndex::Parts::brute_cost(const Int8Book* quantised) const {
  return quantised ? int8_cost(book) : scan_cost(book);
}

// The table of colours, if these points are looked up in it.
const RgbTable* CentroidIndex::Parts::table_for(const PointsView& points, double seen, const Asked& asked, Isa isa,
                                                int threads) {
  const bool fits = points.dtype == DType::u8 && book.dim == 3 && !cosine && book.k <= 65536 &&
                    book.largest <= 1e5f;  // beyond it all colours are nearly alike, and each is decided alone
  const RgbTable* const made = table.get();
  if (!asked.wants(SearchMethod::table, fits) && !(asked.automatic() && fits && (made || seen >= (1 << 18))))
    return nullptr;
  if (made) return made;
  double levels[3 * 256];
  for (int i = 0; i < 3 * 256; ++i) levels[i] = i % 256;
  const std::vector<double> rows(book.rows.begin(), book.rows.end());
  return table.make(rows.data(), book.k, levels, isa, threads);
}

// What is there, and what is worth making. seen: points, with these.
CentroidIndex::Way CentroidIndex::Parts::way_for(const PointsView& points, double seen, const Asked& asked, Isa isa,
                                                 int threads) {
  const int64_t n = points.size(), k = book.k, dim = book.dim;
  const bool automatic = asked.automatic();
  Way way;
  const bool grid_fits = dim == 3 && k <= Grid::kMaxCentroids;
  if (asked.wants(SearchMethod::grid, grid_fits) ||
      (automatic && grid_fits && (grid.get() || seen * double(k) >= (1 << 23)))) {
    way.grid = grid.make(book, isa, threads);
    if (!way.grid->usable()) way.grid = nullptr;
  }
  const bool int8_fits = isa >= Isa::avx512vnni && dim <= Int8Book::kMaxDim;
  if (!way.grid &&
      (asked.wants(SearchMethod::int8, int8_fits) || (automatic && int8_fits && dim >= 3 && k >= 32 && n > kFew))) {
    way.leaves = leaves.make(book);
    way.quantised = int8.make(book, *way.leaves);
    if (!way.quantised->usable()) way.quantised = nullptr;
  }
  const bool tree_fits = dim <= Tree::kMaxDim;
  if (asked.wants(SearchMethod::tree, tree_fits) || way.grid ||
      (automatic && tree_fits && k >= 64 &&
       (tree.get() || seen * brute_cost(way.quantised) >= 400 * double(k) * double(dim + 8))))
    way.tree = tree.make(book);
  way.scanned = asked.wants(SearchMethod::scan, true) || (automatic && n <= kFew);
  if (way.scanned) way.leaves = leaves.make(book);
  return way;
}

// What one thread needs to search block by block.
class CentroidIndex::Worker {
 public:
  Worker(Parts& parts, const PointsView& points, const Way* way, bool automatic, Isa isa)
      : parts_(parts), book_(parts.book), points_(points), way_(way), automatic_(automatic),
        searches_(searches_of(isa)),
        in_place_(points.dtype == DType::f32 && !parts.cosine && points.shape.size() == 1 && points.dim_stride == 4 &&
                  points.strides[0] == 4 * book_.dim),
        widened_(in_place_ ? 0 : size_t(kBlock * book_.dim)) {}

  // Nearest of up to kBlock points from `first` on, or, without a way, distances to those found; the position of the
  // first point that is not finite, or -1.
  int64_t block(int64_t first, int count, int64_t* indices, float* distances) {
    const float* const rows = rows_of(first, count);
    if (points_.dtype != DType::u8) {
      const int wrong = first_not_finite(rows, count, book_.dim);
      if (wrong >= 0) return first + wrong;
    }
    bool zero[kBlock] = {};
    if (parts_.cosine)
      for (int p = 0; p < count; ++p) zero[p] = !normalise(widened_.data() + p * book_.dim, book_.dim);
    if (way_) find(rows, count, indices);
    for (int p = 0; p < count; ++p) {
      if (zero[p]) indices[p] = 0;
      if (distances)
        distances[p] =
            zero[p] ? 1 : float(direct_distance(rows + p * book_.dim, &book_.rows[indices[p] * book_.dim], book_.dim));
    }
    return -1;
  }

 private:
  const float* rows_of(int64_t first, int count) {
    if (in_place_) return static_cast<const float*>(points_.data) + first * book_.dim;
    gather(points_, first, count, widened_.data());
    return widened_.data();
  }

  void find(const float* rows, int count, int64_t* out) {
    if (way_->grid) {
      searches_.in_grid(book_, *way_->grid, *way_->tree, rows, count, out);
    } else if (way_->tree && (tree_pays() || count <= kFew)) {
      parts_.opened += searches_.search(book_, *way_->tree, rows, count, out);
      parts_.by_tree += count;
    } else if (way_->scanned) {
      searches_.scan(book_, *way_->leaves, rows, count, out);
    } else if (!by_int8(rows, count, out)) {
      by_float32(rows, count, out);
    }
  }

  bool tree_pays() const {
    return !automatic_ ||
           double(parts_.opened) * leaf_cost(book_) <= double(parts_.by_tree) * parts_.brute_cost(way_->quantised);
  }

  bool by_int8(const float* rows, int count, int64_t* out) {
    if (!way_->quantised) return false;
    if (automatic_ && (count <= kFew || parts_.unbounded > parts_.bounded + 8)) return false;
    if (!scratch_) scratch_ = std::make_unique<Int8Scratch>(*way_->quantised);
    const bool done = bound_search(book_, *way_->quantised, *way_->leaves, *scratch_, rows, count, out);
    ++(done ? parts_.bounded : parts_.unbounded);
    return done;
  }

  void by_float32(const float* rows, int count, int64_t* out) {
    const Tiles& tiles = *parts_.tiles.make(book_);
    if (!buffers_) buffers_ = std::make_unique<BlockBuffers>(book_, tiles);
    BlockBuffers& w = *buffers_;
    centre(book_, tiles, rows, count, w);
    searches_.nearest(
        book_, tiles,
        {count, rows, w.centred.data(), w.slack.data(), w.group_min.data(), w.low.data(), w.index, w.distance});
    std::copy(w.index, w.index + count, out);
  }

  Parts& parts_;
  const Codebook& book_;
  const PointsView& points_;
  const Way* way_;
  bool automatic_;
  Searches searches_;
  bool in_place_;
  Lines<float> widened_;
  std::unique_ptr<BlockBuffers> buffers_;
  std::unique_ptr<Int8Scratch> scratch_;
};

int64_t CentroidIndex::search(const PointsView& points, int64_t* indices, float* distances, Isa isa, int threads,
                              SearchMethod method) const {
  Parts& parts = *parts_;
  const int64_t n = points.size(), blocks = (n + kBlock - 1) / kBlock;
  const double seen = double(parts.seen += n);
  const Asked asked{method};
  const RgbTable* const table = parts.table_for(points, seen, asked, isa, threads);
  if (table) {
    table->lookup(points, indices, threads);
    if (!distances) return -1;
  }
  const Way way = table ? Way() : parts.way_for(points, seen, asked, isa, threads);

  std::atomic<int64_t> bad{-1}, next{0};
  // A thread takes some 20 us to wake.
  const double cost = double(n) * (table || way.grid ? kGridCost : parts.brute_cost(way.quantised));
  const int used = int(std::clamp<double>(cost / 40000, 1, threads));
  const int64_t chunk = std::clamp<int64_t>(blocks / (used * 4), 1, 16);
  const auto work = [&](int64_t) {
    Worker worker(parts, points, table ? nullptr : &way, asked.automatic(), isa);
    for (int64_t begin; (begin = next.fetch_add(chunk)) < blocks;)
      for (int64_t b = begin; b < std::min(blocks, begin + chunk) && bad < 0; ++b) {
        const int64_t first = b * kBlock;
        const int count = int(std::min<int64_t>(kBlock, n - first));
        const int64_t wrong = worker.block(first, count, indices + first, distances ? distances + first : nullptr);
        if (wrong >= 0) bad = wrong;
      }
  };
  if (used == 1)
    work(0);
  else
    parallel(used, used, work);
  return bad;
}

}  // namespace fastigpt
