// Which of two centroids is nearer, decided in float64 where that can tell and in exact arithmetic where it cannot.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "nearest/codebook.h"

namespace fastigpt {
namespace {

// A sum of float64 without rounding, as parts that do not overlap, in rising order of magnitude (Shewchuk 1997).
struct ExactSum {
  std::vector<double> parts;

  void add(double x) {
    size_t kept = 0;
    for (double y : parts) {
      if (std::abs(x) < std::abs(y)) std::swap(x, y);
      const double high = x + y, low = y - (high - x);
      if (low != 0) parts[kept++] = low;
      x = high;
    }
    parts.resize(kept);
    if (x != 0) parts.push_back(x);
  }
  void add_product(double a, double b) {
    const double high = a * b;
    add(high);
    add(std::fma(a, b, -high));
  }
  bool negative() const { return !parts.empty() && parts.back() < 0; }
};

}  // namespace

bool exactly_nearer(const double* x, const double* a, const double* b, int64_t dim) {
  ExactSum difference;  // |x - a|^2 - |x - b|^2 = a.a - b.b - 2x.a + 2x.b
  for (int64_t d = 0; d < dim; ++d) {
    if (a[d] == b[d]) continue;
    difference.add_product(a[d], a[d]);
    difference.add_product(-b[d], b[d]);
    difference.add_product(-2 * x[d], a[d]);
    difference.add_product(2 * x[d], b[d]);
  }
  return difference.negative();
}

double direct_distance(const float* x, const float* c, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += (double(x[d]) - c[d]) * (double(x[d]) - c[d]);
  return sum;
}

bool beats(const float* rows, const float* x, int64_t dim, int64_t a, int64_t b) {
  const float *ca = rows + a * dim, *cb = rows + b * dim;
  const double da = direct_distance(x, ca, dim), db = direct_distance(x, cb, dim);
  const double margin = double(dim + 8) * std::numeric_limits<double>::epsilon() * std::max(da, db);
  if (std::abs(da - db) > margin) return da < db;
  if (std::equal(ca, ca + dim, cb)) return a < b;
  const std::vector<double> point(x, x + dim), first(ca, ca + dim), second(cb, cb + dim);
  if (exactly_nearer(point.data(), first.data(), second.data(), dim)) return true;
  return a < b && !exactly_nearer(point.data(), second.data(), first.data(), dim);
}

}  // namespace fastigpt
