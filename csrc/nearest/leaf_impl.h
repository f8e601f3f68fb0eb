// The exact search for one point, leaf by leaf of 16 centroids, written once for all instruction sets. Included inside
// a namespace of each search_<isa>.cpp after its vector type, so that no inline function is shared between them.
//
// What the including file defines: kLanes, Vec, load, store, broadcast, fma (a*b+c, fused or not), min, max, plus,
// sub, lowest (of all lanes), first_bit, not_above(a, b) (bit i set unless a[i] > b[i]; NaN counts), kPointVecs
// (vectors of points held in registers).

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
  const Codebook& book;
  const float* x;
  float best = std::numeric_limits<float>::infinity();
  float limit = best;
  int32_t winner = -1;
  int64_t opened = 0;

  Search(const Codebook& book, const float* x) : book(book), x(x) {}

  int64_t dim() const { return kDim ? kDim : book.dim; }

  // Squared distances to a leaf's centroids. Four sums in turn where there are many dimensions: one would wait for
  // itself.
  void distances(const float* columns, Vec* out) const {
    constexpr int kSums = kDim ? 1 : 4;
    const float zero = 0;
    Vec sums[kSums][kParts];
    for (auto& sum : sums)
      for (auto& part : sum) part = broadcast(&zero);
    const auto add = [&](int64_t d, int s) {
      const Vec xv = broadcast(x + d);
      for (int part = 0; part < kParts; ++part) {
        const Vec t = sub(xv, load(columns + d * Tree::kWidth + part * kLanes));
        sums[s][part] = fma(t, t, sums[s][part]);
      }
    };
    int64_t d = 0;
    for (; d + kSums <= dim(); d += kSums)
      for (int s = 0; s < kSums; ++s) add(d + s, s);
    for (; d < dim(); ++d) add(d, 0);
    for (int part = 0; part < kParts; ++part) {
      out[part] = sums[0][part];
      for (int s = 1; s < kSums; ++s) out[part] = plus(out[part], sums[s][part]);
    }
  }

  void open_leaf(const Leaves& leaves, int64_t leaf) {
    ++opened;
    Vec d2[kParts];
    distances(leaves.columns.data() + leaf * dim() * Tree::kWidth, d2);
    if (!within(d2, limit)) return;
    improve(lowest_of(d2));
    const int32_t* index = leaves.index.data() + leaf * Tree::kWidth;
    for (unsigned rivals = within(d2, limit); rivals; rivals &= rivals - 1) challenge(index[first_bit(rivals)]);
  }

  // Centroid j stands at float32 distance d2.
  void meet(int32_t j, float d2) {
    if (d2 > limit) return;
    improve(d2);
    challenge(j);
  }

  void improve(float low) {
    if (!(low < best)) return;
    if (low < best - (limit - best)) winner = -1;  // clearly nearer: the winner so far is out
    best = low;
    limit = limit_of(best);
  }

  float limit_of(float least) const {
    return least < 1e37f ? least * (1 + book.float32_tolerance) + 1e-30f : std::numeric_limits<float>::infinity();
  }

  void challenge(int32_t j) {
    if (j >= 0 && (winner < 0 || beats(book.rows.data(), x, book.dim, j, winner))) winner = j;
  }

  void open_branch(const Tree& tree, int64_t branch, int64_t except) {
    Vec bound[kParts];
    to_boxes<kDim>(x, tree.leaf_boxes.data() + branch * 2 * dim() * Tree::kWidth, dim(), bound);
    for (unsigned leaves = within(bound, limit); leaves; leaves &= leaves - 1) {
      const int64_t leaf = branch * Tree::kWidth + first_bit(leaves);
      if (leaf != except && (within(bound, limit) >> first_bit(leaves) & 1)) open_leaf(tree.leaves, leaf);
    }
  }

  void by_tree(const Tree& tree) {
    const int64_t groups = tree.n_branches / Tree::kWidth, stride = 2 * dim() * Tree::kWidth;
    Vec bound[kParts];
    // The most promising leaf first.
    int64_t branch = 0;
    float low = std::numeric_limits<float>::infinity();
    for (int64_t g = 0; g < groups; ++g) {
      to_boxes<kDim>(x, tree.branch_boxes.data() + g * stride, dim(), bound);
      const float here = lowest_of(bound);
      if (!(here < low)) continue;
      low = here;
      branch = g * Tree::kWidth + first_bit(within(bound, here));
    }
    to_boxes<kDim>(x, tree.leaf_boxes.data() + branch * stride, dim(), bound);
    const int64_t leaf = branch * Tree::kWidth + first_bit(within(bound, lowest_of(bound)));
    open_leaf(tree.leaves, leaf);
    open_branch(tree, branch, leaf);
    for (int64_t g = 0; g < groups; ++g) {
      to_boxes<kDim>(x, tree.branch_boxes.data() + g * stride, dim(), bound);
      for (unsigned branches = within(bound, limit); branches; branches &= branches - 1) {
        const int64_t other = g * Tree::kWidth + first_bit(branches);
        if (other != branch && (within(bound, limit) >> first_bit(branches) & 1)) open_branch(tree, other, -1);
      }
    }
  }
};

// Calls body with the dimension as a constant where that is worth an instance of its own, else with 0.
template <class Body>
auto with_dim(int64_t dim, const Body& body) {
  switch (dim) {
    case 3: return body(std::integral_constant<int, 3>());
    case 4: return body(std::integral_constant<int, 4>());
    case 8: return body(std::integral_constant<int, 8>());
    case 16: return body(std::integral_constant<int, 16>());
    default: return body(std::integral_constant<int, 0>());
  }
}
