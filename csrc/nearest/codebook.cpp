// The codebook in the layouts of the searches that look at every centroid.
#include "nearest/codebook.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastigpt {
namespace { constexpr float kInfinity = std::numeric_limits<float>::infinity(); }  // namespace

Codebook::Codebook(const float* centroids, int64_t k, int64_t dim, bool cosine)
    : k(k), dim(dim), tolerance(double(dim + 8) * std::numeric_limits<double>::epsilon()),
      float32_tolerance(float(dim + 6) * 4 / (1 << 24)), rows(centroids, centroids + k * dim), mean(dim) {
  if (cosine)
    for (int64_t i = 0; i < k; ++i) normalise(&rows[i * dim], dim);
  for (float c : rows) largest = std::max(largest, std::abs(c));
  std::vector<double> sums(dim, 0);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t d = 0; d < dim; ++d) sums[d] += rows[i * dim + d];
  for (int64_t d = 0; d < dim; ++d) mean[d] = float(sums[d] / double(k));
}

Tiles::Tiles(const Codebook& book) : radius2(0) {
  const int64_t k = book.k, dim = book.dim;
  group = std::max<int64_t>(1, (k + kMaxGroups * kStep - 1) / (kMaxGroups * kStep)) * kStep;
  n_groups = (k + group - 1) / group;
  tiles.assign(n_groups * group * (dim + 1), 0);
  columns.assign(n_groups * group * dim, 0);
  for (int64_t i = 0; i < n_groups * group; ++i) {
    float* tile = &tiles[i / kTile * (dim + 1) * kTile + i % kTile];
    float* column = &columns[i / group * dim * group + i % group];
    tile[0] = kInfinity;
    if (i >= k) continue;
    double norm2 = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const float c = book.rows[i * dim + d] - book.mean[d];
      norm2 += double(c) * c;
      tile[(d + 1) * kTile] = -2 * c;
      column[d * group] = book.rows[i * dim + d];
    }
    tile[0] = float(norm2);
    radius2 = std::max(radius2, norm2);
  }
}

Leaves::Leaves(const Codebook& book) {
  resize((book.k + kWidth - 1) / kWidth, book.dim);
  for (int64_t i = 0; i < book.k; ++i)
    set(i / kWidth, i % kWidth, book.dim, int32_t(i), book.rows.data() + i * book.dim);
}

void Leaves::resize(int64_t n, int64_t dim) {
  columns.resize(n * dim * kWidth, kInfinity);
  index.resize(n * kWidth, -1);
}

void Leaves::set(int64_t leaf, int64_t slot, int64_t dim, int32_t centroid, const float* row) {
  for (int64_t d = 0; d < dim; ++d) columns[(leaf * dim + d) * kWidth + slot] = row[d];
  index[leaf * kWidth + slot] = centroid;
}

}  // namespace fastigpt
