// How the k-d tree of a codebook is cut.
#include <algorithm>
#include <limits>
#include <numeric>

#include "nearest/codebook.h"

namespace fastigpt {
namespace {

// Orders centroids [begin, end) so that neighbours in order are neighbours in space: the widest axis is cut at a whole
// number of leaves, until one leaf is left.
void cut(const float* rows, int64_t dim, int32_t* begin, int32_t* end) {
  const int64_t leaves = (end - begin + Tree::kWidth - 1) / Tree::kWidth;
  if (leaves <= 1) return;
  int64_t widest = 0;
  double most = -1;
  for (int64_t d = 0; d < dim; ++d) {
    double sum = 0, squares = 0;
    for (const int32_t* i = begin; i < end; ++i) {
      const double c = rows[*i * dim + d];
      sum += c;
      squares += c * c;
    }
    const double spread = squares - sum * sum / double(end - begin);
    if (spread > most) most = spread, widest = d;
  }
  int32_t* const middle = begin + leaves / 2 * Tree::kWidth;
  std::nth_element(begin, middle, end, [&](int32_t i, int32_t j) {
    const float a = rows[i * dim + widest], b = rows[j * dim + widest];
    return a < b || (a == b && i < j);
  });
  cut(rows, dim, begin, middle);
  cut(rows, dim, middle, end);
}

}  // namespace

Tree::Tree(const Codebook& book) {
  const int64_t k = book.k, dim = book.dim;
  const float* rows = book.rows.data();
  const float infinity = std::numeric_limits<float>::infinity();
  const int64_t full = (k + kWidth - 1) / kWidth, per_group = kWidth * kWidth;
  n_branches = (full + per_group - 1) / per_group * kWidth;
  std::vector<int32_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  cut(rows, dim, order.data(), order.data() + k);

  leaves.resize(n_branches * kWidth, dim);
  const auto empty = [&](Lines<float>& boxes, int64_t n) {
    boxes.resize(n * 2 * dim * kWidth);
    for (size_t i = 0; i < boxes.size(); ++i) boxes[i] = i / (dim * kWidth) % 2 ? -infinity : infinity;
  };
  empty(leaf_boxes, n_branches);
  empty(branch_boxes, n_branches / kWidth);
  const auto grow = [&](Lines<float>& boxes, int64_t box, int64_t d, float c) {
    float& low = boxes[(box / kWidth * 2 * dim + d) * kWidth + box % kWidth];
    float& high = (&low)[dim * kWidth];
    low = std::min(low, c);
    high = std::max(high, c);
  };
  for (int64_t i = 0; i < k; ++i) {
    const int64_t leaf = i / kWidth;
    leaves.set(leaf, i % kWidth, dim, order[i], rows + order[i] * dim);
    for (int64_t d = 0; d < dim; ++d) {
      const float c = rows[order[i] * dim + d];
      grow(leaf_boxes, leaf, d, c);
      grow(branch_boxes, leaf / kWidth, d, c);
    }
  }
}

}  // namespace fastigpt
