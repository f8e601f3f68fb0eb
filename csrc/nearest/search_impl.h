// Ways to search for a block of points: brute force in float32, by the tree, and leaf by leaf. Included in the
// namespace of each search_<isa>.cpp, after leaf_impl.h and with the same vectors.

namespace {

constexpr int kTile = Tiles::kTile;

// Smallest |c|^2 - 2 x.c of every group of centroids, for kPointVecs vectors of points that begin at `first`.
inline void group_minima(const Tiles& tiles, int64_t dim, const Block& block, int first) {
  const float* tile = tiles.tiles.data();
  float infinity = std::numeric_limits<float>::infinity();
  Vec best[kPointVecs];
  for (auto& b : best) b = broadcast(&infinity);
  for (int64_t g = 0; g < tiles.n_groups; ++g) {
    Vec low[kPointVecs];
    for (auto& l : low) l = broadcast(&infinity);
    for (int64_t t = 0; t < tiles.group; t += kTile, tile += (dim + 1) * kTile) {
      Vec acc[kTile][kPointVecs];
      for (int c = 0; c < kTile; ++c)
        for (int v = 0; v < kPointVecs; ++v) acc[c][v] = broadcast(tile + c);
      const float* x = block.centred + first;
      for (int64_t d = 0; d < dim; ++d, x += kBlock) {
        Vec xv[kPointVecs];
        for (int v = 0; v < kPointVecs; ++v) xv[v] = load(x + v * kLanes);
        for (int c = 0; c < kTile; ++c) {
          const Vec cv = broadcast(tile + (d + 1) * kTile + c);
          for (int v = 0; v < kPointVecs; ++v) acc[c][v] = fma(xv[v], cv, acc[c][v]);
        }
      }
      for (int c = 0; c < kTile; ++c)
        for (int v = 0; v < kPointVecs; ++v) low[v] = min(low[v], acc[c][v]);
    }
    for (int v = 0; v < kPointVecs; ++v) {
      store(block.group_min + g * kBlock + first + v * kLanes, low[v]);
      best[v] = min(best[v], low[v]);
    }
  }
  for (int v = 0; v < kPointVecs; ++v) store(block.low + first + v * kLanes, best[v]);
}

// Squared distances of one point to kStep neighbouring centroids of a group, in float64.
inline void direct(const float* row, const float* columns, int64_t dim, int64_t group, double* out) {
  double acc[Tiles::kStep] = {};
  for (int64_t d = 0; d < dim; ++d) {
    const double x = row[d];
    for (int j = 0; j < Tiles::kStep; ++j) {
      const double t = x - columns[d * group + j];
      acc[j] += t * t;
    }
  }
  for (int j = 0; j < Tiles::kStep; ++j) out[j] = acc[j];
}

inline void examine(const Codebook& book, const Tiles& tiles, const Block& block, int p, int64_t g) {
  const float* row = block.rows + p * book.dim;
  const int64_t end = std::min(tiles.group, book.k - g * tiles.group);
  for (int64_t j0 = 0; j0 < end; j0 += Tiles::kStep) {
    double d2[Tiles::kStep];
    direct(row, tiles.columns.data() + g * book.dim * tiles.group + j0, book.dim, tiles.group, d2);
    double limit = block.distance[p] * (1 + book.tolerance);
    for (int64_t j = j0; j < std::min<int64_t>(end, j0 + Tiles::kStep); ++j) {
      if (!(d2[j - j0] <= limit)) continue;
      block.challenge(book, p, g * tiles.group + j, d2[j - j0]);
      limit = block.distance[p] * (1 + book.tolerance);
    }
  }
}

}  // namespace

void nearest(const Codebook& book, const Tiles& tiles, const Block& block) {
  static_assert(kBlock % (kLanes * kPointVecs) == 0, "a block is whole registers");
  for (int first = 0; first < block.count; first += kLanes * kPointVecs) group_minima(tiles, book.dim, block, first);
  for (int p = 0; p < block.count; ++p) block.low[p] += block.slack[p];
  for (int64_t g = 0; g < tiles.n_groups; ++g)
    for (int first = 0; first < block.count; first += kLanes) {
      unsigned candidates = not_above(load(block.group_min + g * kBlock + first), load(block.low + first));
      for (int p = first; candidates && p < block.count; ++p, candidates >>= 1)
        if (candidates & 1) examine(book, tiles, block, p, g);
    }
}

// ---- leaf by leaf ----

int64_t search(const Codebook& book, const Tree& tree, const float* points, int count, int64_t* out) {
  return with_dim(book.dim, [&](auto dim) {
    int64_t opened = 0;
    for (int p = 0; p < count; ++p) {
      Search<decltype(dim)::value> one(book, points + p * book.dim);
      one.by_tree(tree);
      out[p] = one.winner;
      opened += one.opened;
    }
    return opened;
  });
}

void scan(const Codebook& book, const Leaves& leaves, const float* points, int count, int64_t* out) {
  with_dim(book.dim, [&](auto dim) {
    for (int p = 0; p < count; ++p) {
      Search<decltype(dim)::value> one(book, points + p * book.dim);
      for (int64_t leaf = 0; leaf < leaves.size(); ++leaf) one.open_leaf(leaves, leaf);
      out[p] = one.winner;
    }
  });
}
