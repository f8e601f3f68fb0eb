// Which centroids can win inside a box of three dimensions, and the grid of such boxes for float32 points.
//
// (cell_impl.h does the work.) A centroid i is dropped when the one nearest to the box's middle, j, is strictly closer
// in the whole box: |x - i|^2 - |x - j|^2 is linear in x, so its minimum over the box is known.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "nearest/codebook.h"

namespace fastigpt {

Candidates::Candidates(int64_t capacity)
    : index(size_t(capacity)),
      at{Lines<double>(size_t(capacity)), Lines<double>(size_t(capacity)), Lines<double>(size_t(capacity))},
      distance(size_t(capacity)), reach(size_t(capacity)) {}

void Candidates::add(int32_t i, double x, double y, double z) {
  index[count] = i;
  at[0][count] = x, at[1][count] = y, at[2][count] = z;
  ++count;
}

BoxWork box_work(Isa isa) {
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
  if (isa >= Isa::avx512) return nearest_avx512::boxes;
  if (isa == Isa::avx2) return nearest_avx2::boxes;
#endif
  (void)isa;
  return nearest_generic::boxes;
}

Candidates without_repeats(const double* centroids, int64_t k) {
  std::vector<int64_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  const auto row = [&](int64_t i) { return centroids + 3 * i; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return std::lexicographical_compare(row(i), row(i) + 3, row(j), row(j) + 3);
  });
  std::vector<char> repeated(k, 0);
  for (int64_t i = 1; i < k; ++i) repeated[order[i]] = std::equal(row(order[i]), row(order[i]) + 3, row(order[i - 1]));
  Candidates found(k);
  for (int64_t i = 0; i < k; ++i)
    if (!repeated[i]) found.add(int32_t(i), row(i)[0], row(i)[1], row(i)[2]);
  return found;
}

Grid::Grid(const Codebook& book, Isa isa, int threads) {
  const int wanted = book.k <= 64 ? 16 : 32;
  double first[3], step[3];
  for (int d = 0; d < 3; ++d) {
    double least = book.rows[d], most = book.rows[d];
    for (int64_t i = 1; i < book.k; ++i) {
      least = std::min<double>(least, book.rows[3 * i + d]);
      most = std::max<double>(most, book.rows[3 * i + d]);
    }
    // Colours lie around their k-means centres: a margin of 15 % on either side. Points beyond it go by the tree.
    step[d] = 1.3 * (most - least) / wanted;
    first[d] = least - 0.15 * (most - least);
    // float32 must tell cells apart: a hundredth of one is the room given to rounding.
    if (!(step[d] > 1e-15 && step[d] < 1e15 && std::max(std::abs(least), std::abs(most)) < 100 * wanted * step[d]))
      return;
    low[d] = float(first[d]);
    scale[d] = float(1 / step[d]);
  }
  const std::vector<double> rows(book.rows.begin(), book.rows.end());
  const Candidates all = without_repeats(rows.data(), book.k);
  const BoxWork work = box_work(isa);
  const auto keep = [&](const Candidates& box, const int* corner, int edge, Candidates& kept) {
    double middle[3], half[3];
    for (int d = 0; d < 3; ++d) {
      middle[d] = first[d] + step[d] * (corner[d] + 0.5 * edge);
      half[d] = step[d] * (0.5 * edge + 0.01);
    }
    work.keep(box, middle, half, kept);
  };
  cells.resize(size_t(wanted) * wanted * wanted);
  std::vector<std::vector<int32_t>> left_over(cells.size());
  // Boxes are halved, and the eight boxes of half an edge are the tasks.
  const std::function<void(const Candidates&, const int*, int, Candidates*)> split =
      [&](const Candidates& box, const int* corner, int edge, Candidates* scratch) {
        if (edge > 1) {
          for (int i = 0; i < 8; ++i) {
            const int half = edge / 2, at[3] = {corner[0] + (i >> 2) * half, corner[1] + (i >> 1 & 1) * half,
                                                corner[2] + (i & 1) * half};
            keep(box, at, half, *scratch);
            split(*scratch, at, half, scratch + 1);
          }
          return;
        }
        const size_t place = (size_t(corner[0]) * wanted + corner[1]) * wanted + corner[2];
        Cell& cell = cells[place];
        for (int slot = 0; slot < kWidth; ++slot) {
          const bool used = slot < box.count;
          for (int d = 0; d < 3; ++d)
            cell.at[d][slot] = used ? float(box.at[d][slot]) : std::numeric_limits<float>::infinity();
          cell.index[slot] = used ? uint16_t(box.index[slot]) : 0;
        }
        cell.first = cell.count = 0;
        if (box.count > kWidth) left_over[place].assign(box.index.begin() + kWidth, box.index.begin() + box.count);
      };
  const int edge = wanted / 4;
  parallel(64, threads, [&](int64_t i) {
    std::vector<Candidates> scratch(8, Candidates(all.count));
    const int corner[3] = {int(i / 16) * edge, int(i / 4 % 4) * edge, int(i % 4) * edge};
    keep(all, corner, edge, scratch[0]);
    split(scratch[0], corner, edge, &scratch[1]);
  });
  int64_t n = 0;
  for (size_t place = 0; place < cells.size(); ++place) {
    cells[place].first = int32_t(n);
    cells[place].count = int32_t((left_over[place].size() + Leaves::kWidth - 1) / Leaves::kWidth);
    n += cells[place].count;
  }
  rest.resize(n, 3);
  for (size_t place = 0; place < cells.size(); ++place)
    for (size_t i = 0; i < left_over[place].size(); ++i)
      rest.set(cells[place].first + int64_t(i) / Leaves::kWidth, int64_t(i) % Leaves::kWidth, 3, left_over[place][i],
               &book.rows[3 * left_over[place][i]]);
  side = wanted;
}

}  // namespace fastigpt
