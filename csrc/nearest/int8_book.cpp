// The codebook in int8, and how far its scores can be from the truth.
//
// With x' = x - mean and c' = c - mean in real arithmetic, the nearest centroid is the one with the least
//
//     t(c) = |c'|^2 / 2 - x'.c' = (|x - c|^2 - |x'|^2) / 2.
//
// In place of x' and c' stand integers of at most 127: x' = u p + e, c' = s q + f, with one unit u for a block of
// points and one s for the codebook. The score is an integer, and only its first term is ever rounded:
//
//     T(c) = n(c) - p.q,   n(c) = the integer nearest to (|c'|^2 / 2 - c'.f) / (u s).
//
// Without that rounding,  u s T(c) = |c'|^2 / 2 - c'.f - (x' - e).(c' - f) = t(c) + e.x' + (x' - c').(f - e) - e.f,
// where e.x' is the same for all centroids. So, by Cauchy and Schwarz, and with a = the bound of n's rounding,
//
//     |u s T(c) - t(c) - e.x'|  <=  |x - c| (|e| + |f|) + |e| |f| + u s a.
//
// The error grows with the distance from the centroid, not with the size of either: that is what -c'.f is for. Of |f|
// the largest of the codebook is kept (`error`); let g = |e| + error, h = |e| error + u s a. Let m have the least score
// and r = |x - m|. Then r^2 / 2 - r g - h <= u s T(m) + |x'|^2 / 2 - e.x' =: M, so r <= g + sqrt(g^2 + 2 (M + h)),
// which is known. The nearest centroid c is no farther than that, hence
//
//     u s T(c)  <=  r^2 / 2 + r g + h - |x'|^2 / 2 + e.x',
//
// and every centroid with a larger score is out.
//
// What the machine rounds: here, float64 throughout, covered by a millionth. In the search (search_avx512vnni.cpp) x'
// is a float32 difference, off by at most 2^-24 |x'|, which adds to |e|; sums over the dimensions run in 16 lanes of
// float32, kMaxDim / 16 + 4 additions deep, so |x'|^2, |e|^2 and |e| |x'| >= |e.x'| are known to 5e-6; n(c) is two
// float32 products and a rounding of (|c'|^2 / 2 - c'.f), so a = 1/2 + 2^-22 |n(c)|. Squares that underflow are nothing
// beside the units: s lies in [1e-12, 1e12], and u is at least s / 64, which also keeps |n(c)| below
// 64 kMaxDim 127 (127 + 1) / 2 = 5.4e8 and every score inside (-2^30, 2^30).
#include <algorithm>
#include <cmath>

#include "nearest/codebook.h"

namespace fastigpt {

Int8Book::Int8Book(const Codebook& book, const Leaves& leaves)
    : n_groups(leaves.size()), quads((book.dim + 3) / 4), error(0), largest(0) {
  const int64_t k = book.k, dim = book.dim;
  double most = 0;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t d = 0; d < dim; ++d)
      most = std::max(most, std::abs(double(book.rows[i * dim + d]) - double(book.mean[d])));
  const float unit = float(most / 127 * (1 + 1e-6));
  if (dim > kMaxDim || !(unit >= 1e-12f && unit <= 1e12f)) return;

  panels.assign(size_t(n_groups * quads * kGroup * 4), 0);
  first_terms.assign(size_t(n_groups * kGroup), 0);
  corrections.assign(size_t(n_groups * kGroup), kPadding);
  for (int64_t slot = 0; slot < n_groups * kGroup; ++slot) {
    const int64_t i = leaves.index[slot];
    if (i < 0) continue;
    double norm2 = 0, error2 = 0, along = 0;
    int32_t sum = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double c = double(book.rows[i * dim + d]) - double(book.mean[d]);
      const int q = int(std::rint(c / unit));
      const double short_of = c - double(unit) * q;
      panels[((slot / kGroup * quads + d / 4) * kGroup + slot % kGroup) * 4 + d % 4] = int8_t(-q);
      sum += q;
      norm2 += c * c;
      error2 += short_of * short_of;
      along += c * short_of;
    }
    const double first = norm2 / 2 - along;
    first_terms[slot] = float(first);
    corrections[slot] = 128 * sum;
    error = std::max(error, std::sqrt(error2) * (1 + 1e-6));
    largest = std::max(largest, std::abs(first));
  }
  scale = unit;
}

Int8Scratch::Int8Scratch(const Int8Book& book)
    : minima(size_t(book.n_groups * kBlock)), survivors(size_t(book.n_groups)), bytes(size_t(book.quads * kBlock * 4)) {
}

}  // namespace fastigpt
