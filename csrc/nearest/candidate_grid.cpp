// Which centroids can win inside a box of three dimensions, and the grid of such boxes for float32 points.
//
// A centroid i is dropped when the one nearest to the box's middle, j, is strictly closer in the whole box: |x - i|^2 -
// |x - j|^2 is linear in x, so its minimum over the box is known.
#include <algorithm>
#include <cmath>

#include "nearest/codebook.h"

namespace fastigpt {

void Candidates::add(int32_t i, double x, double y, double z) {
  index.push_back(i);
  at[0].push_back(x), at[1].push_back(y), at[2].push_back(z);
}

void Candidates::keep(const Candidates& box, const double* middle, const double* half) {
  const size_t n = box.index.size();
  distance.resize(n);
  const double *x = box.at[0].data(), *y = box.at[1].data(), *z = box.at[2].data();
  for (size_t i = 0; i < n; ++i) {
    const double u = x[i] - middle[0], v = y[i] - middle[1], w = z[i] - middle[2];
    distance[i] = u * u + v * v + w * w;
  }
  const size_t j = std::min_element(distance.begin(), distance.end()) - distance.begin();
  index.clear();
  for (auto& axis : at) axis.clear();
  for (size_t i = 0; i < n; ++i) {
    const double reach =
        half[0] * std::abs(x[i] - x[j]) + half[1] * std::abs(y[i] - y[j]) + half[2] * std::abs(z[i] - z[j]);
    if (!(distance[i] - distance[j] > 2 * reach + 1e-12 * (distance[i] + distance[j])))
      add(box.index[i], x[i], y[i], z[i]);
  }
}

Grid::Grid(const float* rows, int64_t k) {
  double first[3], step[3];
  for (int d = 0; d < 3; ++d) {
    double least = rows[d], most = rows[d];
    for (int64_t i = 1; i < k; ++i) {
      least = std::min<double>(least, rows[3 * i + d]);
      most = std::max<double>(most, rows[3 * i + d]);
    }
    // Colours lie around their k-means centres: a margin of 15 % on either side. Points beyond it go by the tree.
    step[d] = 1.3 * (most - least) / kSide;
    first[d] = least - 0.15 * (most - least);
    // float32 must tell cells apart: a thousandth of one is the room given to rounding.
    if (!(step[d] > 1e-15 && step[d] < 1e15 && std::max(std::abs(least), std::abs(most)) < 100 * kSide * step[d]))
      return;
    low[d] = float(first[d]);
    scale[d] = float(1 / step[d]);
  }
  Candidates all, coarse, fine;
  for (int64_t i = 0; i < k; ++i) all.add(int32_t(i), rows[3 * i], rows[3 * i + 1], rows[3 * i + 2]);
  const auto keep = [&](const Candidates& box, const int* cell, int edge, Candidates& kept) {
    double middle[3], half[3];
    for (int d = 0; d < 3; ++d) {
      middle[d] = first[d] + step[d] * (cell[d] + 0.5 * edge);
      half[d] = step[d] * (0.5 * edge + 0.01);
    }
    kept.keep(box, middle, half);
  };
  start.assign(kSide * kSide * kSide + 1, 0);
  std::vector<std::vector<int32_t>> lists(kSide * kSide * kSide);
  for (int i = 0; i < 64; ++i) {
    const int corner[3] = {i / 16 * 4, i / 4 % 4 * 4, i % 4 * 4};
    keep(all, corner, 4, coarse);
    for (int j = 0; j < 64; ++j) {
      const int cell[3] = {corner[0] + j / 16, corner[1] + j / 4 % 4, corner[2] + j % 4};
      keep(coarse, cell, 1, fine);
      lists[(cell[0] * kSide + cell[1]) * kSide + cell[2]] = fine.index;
    }
  }
  int64_t n = 0;
  for (size_t cell = 0; cell < lists.size(); ++cell) {
    start[cell] = int32_t(n);
    n += (int64_t(lists[cell].size()) + Leaves::kWidth - 1) / Leaves::kWidth;
  }
  start.back() = int32_t(n);
  leaves.resize(n, 3);
  for (size_t cell = 0; cell < lists.size(); ++cell)
    for (size_t i = 0; i < lists[cell].size(); ++i)
      leaves.set(start[cell] + int64_t(i) / Leaves::kWidth, int64_t(i) % Leaves::kWidth, 3, lists[cell][i],
                 rows + 3 * lists[cell][i]);
}

}  // namespace fastigpt
