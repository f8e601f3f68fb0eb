// The two passes of nearest_centroid over one block of points, written once for all instruction sets. Included inside a
// namespace of each quantize_<isa>.cpp after its vector type, so that no inline function is shared between them.
//
// What the including file defines: kLanes, Vec, load, store, broadcast, fma (a*b+c, fused or not), min, not_above(a, b)
// (bit i set unless a[i] > b[i]; NaN counts), kPointVecs (vectors of points held in registers).

constexpr int kTile = Codebook::kTile;

// Smallest |c|^2 - 2 x.c of every group of centroids, for kPointVecs vectors of points that begin at `first`.
inline void group_minima(const Codebook& book, const Block& block, int first) {
  const int64_t dim = book.dim;
  const float* tile = book.tiles.data();
  float infinity = std::numeric_limits<float>::infinity();
  Vec best[kPointVecs];
  for (auto& b : best) b = broadcast(&infinity);
  for (int64_t g = 0; g < book.n_groups; ++g) {
    Vec low[kPointVecs];
    for (auto& l : low) l = broadcast(&infinity);
    for (int64_t t = 0; t < book.group; t += kTile, tile += (dim + 1) * kTile) {
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
  double acc[Codebook::kStep] = {};
  for (int64_t d = 0; d < dim; ++d) {
    const double x = row[d];
    for (int j = 0; j < Codebook::kStep; ++j) {
      const double t = x - columns[d * group + j];
      acc[j] += t * t;
    }
  }
  for (int j = 0; j < Codebook::kStep; ++j) out[j] = acc[j];
}

inline void examine(const Codebook& book, const Block& block, int p, int64_t g) {
  const float* row = block.rows + p * book.dim;
  const int64_t end = std::min(book.group, book.k - g * book.group);
  for (int64_t j0 = 0; j0 < end; j0 += Codebook::kStep) {
    double d2[Codebook::kStep];
    direct(row, book.columns.data() + g * book.dim * book.group + j0, book.dim, book.group, d2);
    double limit = block.distance[p] * (1 + book.tolerance);
    for (int64_t j = j0; j < std::min<int64_t>(end, j0 + Codebook::kStep); ++j) {
      if (!(d2[j - j0] <= limit)) continue;
      block.challenge(book, p, g * book.group + j, d2[j - j0]);
      limit = block.distance[p] * (1 + book.tolerance);
    }
  }
}

void nearest(const Codebook& book, const Block& block) {
  static_assert(kBlock % (kLanes * kPointVecs) == 0, "a block is whole registers");
  for (int first = 0; first < kBlock; first += kLanes * kPointVecs) group_minima(book, block, first);
  for (int p = 0; p < kBlock; ++p) block.low[p] += block.slack[p];
  for (int64_t g = 0; g < book.n_groups; ++g)
    for (int first = 0; first < block.count; first += kLanes) {
      unsigned candidates = not_above(load(block.group_min + g * kBlock + first), load(block.low + first));
      for (int p = first; candidates && p < block.count; ++p, candidates >>= 1)
        if (candidates & 1) examine(book, block, p, g);
    }
}
