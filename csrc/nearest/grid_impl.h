// By the grid of cells, over one block of points in three dimensions. Included as search_impl.h is.
//
// A cell holds up to eight centroids in two cache lines, so a point costs two misses, asked for a block ahead, three
// fused multiply-adds and the least of eight. Anything else (more than eight, two too close for float32, outside)
// takes the long way.

namespace {

constexpr int kCellParts = Grid::kWidth / kLanes;
static_assert(Grid::kWidth % kLanes == 0, "a cell is whole registers");

inline void prefetch_cell(const Grid::Cell* cell) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(cell);
  __builtin_prefetch(reinterpret_cast<const char*>(cell) + 64);
#else
  (void)cell;
#endif
}

// Where each point's cell lies; null outside.
inline void locate(const Grid& grid, const float* points, int count, const Grid::Cell** cells) {
  const float side = float(grid.side);
  const float l0 = grid.low[0], l1 = grid.low[1], l2 = grid.low[2];
  const float s0 = grid.scale[0], s1 = grid.scale[1], s2 = grid.scale[2];
  for (int p = 0; p < count; ++p) {
    const float* x = points + 3 * p;
    const float u = (x[0] - l0) * s0, v = (x[1] - l1) * s1, w = (x[2] - l2) * s2;
    const bool inside = bool(int(u >= 0) & int(v >= 0) & int(w >= 0) & int(u < side) & int(v < side) & int(w < side));
    cells[p] = nullptr;
    if (!inside) continue;
    cells[p] = grid.cells.data() + (int64_t(int(u)) * grid.side + int(v)) * grid.side + int(w);
    prefetch_cell(cells[p]);
  }
}

// The rest of what a cell asks for: `mask` are the centroids of the first eight that float32 cannot rule out.
inline int64_t decide(const Codebook& book, const Grid& grid, const Grid::Cell& cell, const float* x, float least,
                      float limit, unsigned mask) {
  Search<3> one(book, x);
  one.best = least;
  one.limit = limit;
  for (; mask; mask &= mask - 1) one.challenge(cell.index[first_bit(mask)]);
  for (int32_t i = 0; i < cell.count; ++i) one.open_leaf(grid.rest, cell.first + i);
  return one.winner;
}

}  // namespace

void in_grid(const Codebook& book, const Grid& grid, const Tree& tree, const float* points, int count, int64_t* out) {
  const Grid::Cell* cells[kBlock];
  locate(grid, points, count, cells);
  for (int p = 0; p < count; ++p) {
    const float* x = points + 3 * p;
    if (!cells[p]) {
      Search<3> one(book, x);
      one.by_tree(tree);
      out[p] = one.winner;
      continue;
    }
    const Grid::Cell& cell = *cells[p];
    const Vec xv = broadcast(x), yv = broadcast(x + 1), zv = broadcast(x + 2);
    Vec d2[kCellParts], low;
    for (int part = 0; part < kCellParts; ++part) {
      const Vec u = sub(xv, load(cell.at[0] + part * kLanes)), v = sub(yv, load(cell.at[1] + part * kLanes)),
                w = sub(zv, load(cell.at[2] + part * kLanes));
      d2[part] = fma(u, u, fma(v, v, times(w, w)));
      low = part ? min(low, d2[part]) : d2[part];
    }
    const float least = lowest(low), limit = least * (1 + book.float32_tolerance) + 1e-30f;
    unsigned mask = 0;
    for (int part = 0; part < kCellParts; ++part) mask |= not_above(d2[part], broadcast(&limit)) << part * kLanes;
    if ((mask & (mask - 1)) | unsigned(cell.count))
      out[p] = decide(book, grid, cell, x, least, limit, mask);
    else
      out[p] = cell.index[first_bit(mask)];
  }
}
