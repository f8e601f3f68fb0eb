// The two ways of nearest_centroid, brute force and by the tree, over one block of points, written once for all
// instruction sets. Included inside a namespace of each search_<isa>.cpp after its vector type, so that no inline
// function is shared between them.
//
// What the including file defines: kLanes, Vec, load, store, broadcast, fma (a*b+c, fused or not), min, max, sub,
// lowest (of all lanes), first_bit, not_above(a, b) (bit i set unless a[i] > b[i]; NaN counts), kPointVecs (vectors of
// points held in registers).

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

// ---- by the tree ----

constexpr int kParts = Tree::kWidth / kLanes;

// Squared distances from x to the 16 boxes low[dim][16] = boxes, high[dim][16] = boxes + 16 * dim. kDim: the dimension
// where it is known to the compiler, else 0; this holds for all below.
template <int kDim>
inline void to_boxes(const float* x, const float* boxes, int64_t any_dim, Vec* out) {
  const int64_t dim = kDim ? kDim : any_dim;
  const float zero = 0;
  for (int part = 0; part < kParts; ++part) out[part] = broadcast(&zero);
  for (int64_t d = 0; d < dim; ++d) {
    const Vec xv = broadcast(x + d);
    for (int part = 0; part < kParts; ++part) {
      const Vec low = load(boxes + d * Tree::kWidth + part * kLanes),
                high = load(boxes + (dim + d) * Tree::kWidth + part * kLanes);
      const Vec beyond = sub(xv, min(max(xv, low), high));
      out[part] = fma(beyond, beyond, out[part]);
    }
  }
}

inline unsigned within(const Vec* distances, float limit) {
  unsigned mask = 0;
  for (int part = 0; part < kParts; ++part) mask |= not_above(distances[part], broadcast(&limit)) << part * kLanes;
  return mask;
}

inline float lowest_of(const Vec* distances) {
  Vec low = distances[0];
  for (int part = 1; part < kParts; ++part) low = min(low, distances[part]);
  return lowest(low);
}

// The search for one point: the best so far, and how far a rival may lie.
template <int kDim>
struct Search {
  const Tree& tree;
  const float* x;
  float best = std::numeric_limits<float>::infinity();
  float limit = best;
  int32_t winner = -1;
  int64_t opened = 0;

  Search(const Tree& tree, const float* x) : tree(tree), x(x) {}

  void open_leaf(const Leaves& leaves, int64_t leaf) {
    const int64_t dim = kDim ? kDim : tree.dim;
    ++opened;
    const float* columns = leaves.columns.data() + leaf * dim * Tree::kWidth;
    const float zero = 0;
    Vec d2[kParts];
    for (auto& part : d2) part = broadcast(&zero);
    for (int64_t d = 0; d < dim; ++d) {
      const Vec xv = broadcast(x + d);
      for (int part = 0; part < kParts; ++part) {
        const Vec t = sub(xv, load(columns + d * Tree::kWidth + part * kLanes));
        d2[part] = fma(t, t, d2[part]);
      }
    }
    if (!within(d2, limit)) return;
    const float low = lowest_of(d2);
    if (low < best) {
      if (low < best - (limit - best)) winner = -1;  // clearly nearer: the winner so far is out
      best = low;
      limit = best < 1e37f ? best * (1 + tree.tolerance) + 1e-30f : std::numeric_limits<float>::infinity();
    }
    const int32_t* index = leaves.index.data() + leaf * Tree::kWidth;
    for (unsigned rivals = within(d2, limit); rivals; rivals &= rivals - 1) {
      const int32_t j = index[first_bit(rivals)];
      if (j >= 0 && (winner < 0 || beats(tree.rows, x, dim, j, winner))) winner = j;
    }
  }

  void open_branch(int64_t branch, int64_t except) {
    Vec bound[kParts];
    to_boxes<kDim>(x, tree.leaf_boxes.data() + branch * 2 * tree.dim * Tree::kWidth, tree.dim, bound);
    for (unsigned leaves = within(bound, limit); leaves; leaves &= leaves - 1) {
      const int64_t leaf = branch * Tree::kWidth + first_bit(leaves);
      if (leaf != except && (within(bound, limit) >> first_bit(leaves) & 1)) open_leaf(tree.leaves, leaf);
    }
  }

  void by_tree() {
    const int64_t groups = tree.n_branches / Tree::kWidth, stride = 2 * tree.dim * Tree::kWidth;
    Vec bound[kParts];
    // The most promising leaf first.
    int64_t branch = 0;
    float low = std::numeric_limits<float>::infinity();
    for (int64_t g = 0; g < groups; ++g) {
      to_boxes<kDim>(x, tree.branch_boxes.data() + g * stride, tree.dim, bound);
      const float here = lowest_of(bound);
      if (!(here < low)) continue;
      low = here;
      branch = g * Tree::kWidth + first_bit(within(bound, here));
    }
    to_boxes<kDim>(x, tree.leaf_boxes.data() + branch * stride, tree.dim, bound);
    const int64_t leaf = branch * Tree::kWidth + first_bit(within(bound, lowest_of(bound)));
    open_leaf(tree.leaves, leaf);
    open_branch(branch, leaf);
    for (int64_t g = 0; g < groups; ++g) {
      to_boxes<kDim>(x, tree.branch_boxes.data() + g * stride, tree.dim, bound);
      for (unsigned branches = within(bound, limit); branches; branches &= branches - 1) {
        const int64_t other = g * Tree::kWidth + first_bit(branches);
        if (other != branch && (within(bound, limit) >> first_bit(branches) & 1)) open_branch(other, -1);
      }
    }
  }

  void by_grid(const Grid& grid) {
    const float side = Grid::kSide;
    const float u = (x[0] - grid.low[0]) * grid.scale[0], v = (x[1] - grid.low[1]) * grid.scale[1],
                w = (x[2] - grid.low[2]) * grid.scale[2];
    if (!(u >= 0 && v >= 0 && w >= 0 && u < side && v < side && w < side)) return by_tree();
    const int cell = (int(u) * Grid::kSide + int(v)) * Grid::kSide + int(w);
    const int32_t *leaf = grid.start.data() + cell, last = leaf[1];
    for (int32_t i = leaf[0]; i < last; ++i) open_leaf(grid.leaves, i);
  }
};

template <int kDim>
int64_t search_all(const Tree& tree, const float* points, int count, int64_t* index) {
  int64_t opened = 0;
  for (int p = 0; p < count; ++p) {
    Search<kDim> one(tree, points + p * tree.dim);
    if (kDim == 3 && tree.grid)
      one.by_grid(*tree.grid);
    else
      one.by_tree();
    index[p] = one.winner;
    opened += one.opened;
  }
  return opened;
}

int64_t search(const Tree& tree, const float* points, int count, int64_t* index) {
  switch (tree.dim) {
    case 3: return search_all<3>(tree, points, count, index);
    case 4: return search_all<4>(tree, points, count, index);
    case 8: return search_all<8>(tree, points, count, index);
    case 16: return search_all<16>(tree, points, count, index);
    default: return search_all<0>(tree, points, count, index);
  }
}
