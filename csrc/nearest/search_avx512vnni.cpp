// Nearest centroid by int8 scores (AVX512-VNNI): most centroids are ruled out at four dimensions to a multiply-add, the
// rest compared as always. int8_book.cpp has the bound and its proof.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include "nearest/codebook.h"

namespace fastigpt::nearest_avx512vnni {
namespace {

#include "nearest/vectors_avx512.h"

#include "nearest/leaf_impl.h"

constexpr int kGroup = Int8Book::kGroup, kTileRows = 4;

inline double max_of(double a, double b) { return a > b ? a : b; }

// A block of points in int8, x - mean = unit p + e. Points in use are rounded up to whole vectors.
struct Quantised {
  int vectors;
  float unit;
  const uint8_t* bytes;                  // [quads, kBlock, 4]: p + 128
  double norm2[kBlock], spread[kBlock];  // |x - mean|^2 - 2 e.(x - mean), and how far that can be off
  double error[kBlock];                  // |e|
  int32_t least[kBlock];                 // least score of all centroids
  int32_t limit[kBlock];                 // greatest score with which a centroid can be nearest
};

// Coordinates [d, d + 16) of x - mean, zeros beyond the last.
inline Vec centred(const Codebook& book, const float* x, int64_t d) {
  const int64_t left = book.dim - d;
  const __mmask16 used = left >= kLanes ? 0xffff : __mmask16((1u << left) - 1);
  return _mm512_sub_ps(_mm512_maskz_loadu_ps(used, x + d), _mm512_maskz_loadu_ps(used, book.mean.data() + d));
}

// False where the points are too far from the codebook for int8 to tell anything.
bool quantise(const Codebook& book, const Int8Book& quantised, const float* points, int count, uint8_t* bytes,
              Quantised& block) {
  const int64_t dim = book.dim;
  Vec farthest = _mm512_setzero_ps();
  for (int p = 0; p < count; ++p)
    for (int64_t d = 0; d < dim; d += kLanes)
      farthest = _mm512_max_ps(farthest, _mm512_abs_ps(centred(book, points + p * dim, d)));
  const float most = _mm512_reduce_max_ps(farthest);
  if (!(most < 1e15f)) return false;
  const float unit = float(max_of(most * (1.000001 / 127), quantised.scale / 64));
  const Vec units = _mm512_set1_ps(unit), inverse = _mm512_set1_ps(1 / unit);
  block.vectors = (count + kLanes - 1) / kLanes;
  block.unit = unit;
  block.bytes = bytes;
  for (int p = 0; p < count; ++p) {
    Vec norms = _mm512_setzero_ps(), errors = norms, along = norms;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const Vec x = centred(book, points + p * dim, d);
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
      const Vec short_of = _mm512_fnmadd_ps(units, _mm512_cvtepi32_ps(q), x);
      norms = _mm512_fmadd_ps(x, x, norms);
      errors = _mm512_fmadd_ps(short_of, short_of, errors);
      along = _mm512_fmadd_ps(short_of, x, along);
      alignas(16) uint8_t narrow[kLanes];
      _mm_store_si128(reinterpret_cast<__m128i*>(narrow),
                      _mm512_cvtepi32_epi8(_mm512_add_epi32(q, _mm512_set1_epi32(128))));
      for (int64_t quad = d / 4; quad < quantised.quads && quad < d / 4 + 4; ++quad)
        std::memcpy(bytes + (quad * kBlock + p) * 4, narrow + (quad * 4 - d), 4);
    }
    const double norm2 = _mm512_reduce_add_ps(norms), norm = std::sqrt(norm2);
    block.error[p] = std::sqrt(double(_mm512_reduce_add_ps(errors))) * 1.00001 + norm * (1.0 / (1 << 23));
    block.norm2[p] = norm2 - 2 * double(_mm512_reduce_add_ps(along));
    block.spread[p] = 1e-5 * norm2 + 1e-5 * block.error[p] * norm;
  }
  for (int p = count; p < block.vectors * kLanes; ++p) {
    for (int64_t quad = 0; quad < quantised.quads; ++quad) std::memset(bytes + (quad * kBlock + p) * 4, 128, 4);
  }
  return true;
}

// What a centroid may score and still win, by the least score of all.
void set_limits(const Int8Book& book, int count, Quantised& block) {
  const double unit = double(block.unit) * book.scale, rounding = unit * (1 + book.largest / unit / (1 << 22));
  for (int p = 0; p < count; ++p) {
    const double g = block.error[p] + book.error, h = block.error[p] * book.error + rounding;
    const double m = unit * block.least[p] + (block.norm2[p] + block.spread[p]) / 2 + h;
    const double r = g + std::sqrt(g * g + 2 * max_of(m, 0));
    const double most = (r * r / 2 + r * g + h) * 1.000001 - (block.norm2[p] - block.spread[p]) / 2;
    block.limit[p] = most / unit < 1e9 ? int32_t(std::floor(most / unit)) + 1 : 1000000000;  // above all real scores
  }
  for (int p = count; p < kBlock; ++p) block.limit[p] = std::numeric_limits<int32_t>::min();
}

// Least score of every group for every point, [n_groups, V * 16], and of all. kQuads: their number where it
// is known to the compiler, else 0.
template <int V, int kQuads>
void group_minima(const Int8Book& book, Quantised& block, int32_t* out) {
  const int64_t quads = kQuads ? kQuads : book.quads;
  const __m512 inverse = _mm512_set1_ps(float(1 / (double(block.unit) * book.scale)));
  __m512i least[V];
  for (auto& l : least) l = _mm512_set1_epi32(std::numeric_limits<int32_t>::max());
  alignas(64) int32_t first[kGroup];
  for (int64_t g = 0; g < book.n_groups; ++g) {
    const __m512i norms = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(&book.first_terms[g * kGroup]), inverse));
    _mm512_store_si512(first, _mm512_add_epi32(norms, _mm512_loadu_si512(&book.corrections[g * kGroup])));
    __m512i low[V];
    for (auto& l : low) l = _mm512_set1_epi32(std::numeric_limits<int32_t>::max());
    const int8_t* const panel = book.panels.data() + g * quads * kGroup * 4;
    for (int c0 = 0; c0 < kGroup; c0 += kTileRows) {
      __m512i acc[kTileRows][V];
      for (int c = 0; c < kTileRows; ++c)
        for (int v = 0; v < V; ++v) acc[c][v] = _mm512_set1_epi32(first[c0 + c]);
      for (int64_t q = 0; q < quads; ++q) {
        __m512i x[V];
        for (int v = 0; v < V; ++v) x[v] = _mm512_loadu_si512(block.bytes + (q * kBlock + v * kLanes) * 4);
        for (int c = 0; c < kTileRows; ++c) {
          int32_t four;
          std::memcpy(&four, panel + (q * kGroup + c0 + c) * 4, 4);
          for (int v = 0; v < V; ++v) acc[c][v] = _mm512_dpbusd_epi32(acc[c][v], x[v], _mm512_set1_epi32(four));
        }
      }
      for (int c = 0; c < kTileRows; ++c)
        for (int v = 0; v < V; ++v) low[v] = _mm512_min_epi32(low[v], acc[c][v]);
    }
    for (int v = 0; v < V; ++v) {
      _mm512_storeu_si512(out + (g * V + v) * kLanes, low[v]);
      least[v] = _mm512_min_epi32(least[v], low[v]);
    }
  }
  for (int v = 0; v < V; ++v) _mm512_storeu_si512(block.least + v * kLanes, least[v]);
}

template <int V>
void group_minima(const Int8Book& book, Quantised& block, int32_t* out) {
  switch (book.quads) {
    case 1: return group_minima<V, 1>(book, block, out);
    case 2: return group_minima<V, 2>(book, block, out);
    case 4: return group_minima<V, 4>(book, block, out);
    default: return group_minima<V, 0>(book, block, out);
  }
}

// Survivors of all groups; returns their number, and how many pairs of point and group they are.
template <int V>
int64_t sift(const Int8Book& book, Quantised& block, int count, int32_t* minima, Survivor* out, int64_t* pairs) {
  group_minima<V>(book, block, minima);
  set_limits(book, count, block);
  __m512i limit[V];
  for (int v = 0; v < V; ++v) limit[v] = _mm512_loadu_si512(block.limit + v * kLanes);
  int64_t n = 0;
  *pairs = 0;
  for (int64_t g = 0; g < book.n_groups; ++g) {
    uint64_t points = 0;
    for (int v = 0; v < V; ++v)
      points |= uint64_t(_mm512_cmple_epi32_mask(_mm512_loadu_si512(minima + (g * V + v) * kLanes), limit[v]))
                << v * kLanes;
    out[n] = {g, points};
    n += points != 0;
    *pairs += _mm_popcnt_u64(points);
  }
  return n;
}

// The centroids of a group, one bit each, that one point's limit leaves.
unsigned left_in_group(const Int8Book& book, const Quantised& block, int64_t g, int p) {
  const __m512 inverse = _mm512_set1_ps(float(1 / (double(block.unit) * book.scale)));
  __m512i score =
      _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(&book.first_terms[g * kGroup]), inverse)),
                       _mm512_loadu_si512(&book.corrections[g * kGroup]));
  const int8_t* const panel = book.panels.data() + g * book.quads * kGroup * 4;
  __m512i sums[4] = {score, _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  const auto add = [&](int64_t q, __m512i& sum) {  // to four sums in turn: one would wait for itself
    int32_t four;
    std::memcpy(&four, block.bytes + (q * kBlock + p) * 4, 4);
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(four), _mm512_loadu_si512(panel + q * kGroup * 4));
  };
  int64_t q = 0;
  for (; q + 4 <= book.quads; q += 4)
    for (int i = 0; i < 4; ++i) add(q + i, sums[i]);
  for (; q < book.quads; ++q) add(q, sums[0]);
  score = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
  return _mm512_cmple_epi32_mask(score, _mm512_set1_epi32(block.limit[p]));
}

// Squared distance in float32, in 16 lanes: no less exact than Search::distances.
inline float row_distance(const Codebook& book, const float* x, int64_t j) {
  const float* const row = book.rows.data() + j * book.dim;
  Vec sum = _mm512_setzero_ps();
  int64_t d = 0;
  for (; d + kLanes <= book.dim; d += kLanes) {
    const Vec t = sub(load(x + d), load(row + d));
    sum = fma(t, t, sum);
  }
  const __mmask16 used = __mmask16((1u << (book.dim - d)) - 1);
  const Vec t = sub(_mm512_maskz_loadu_ps(used, x + d), _mm512_maskz_loadu_ps(used, row + d));
  return _mm512_reduce_add_ps(fma(t, t, sum));
}

constexpr int kLongRow = 32;  // dimensions from which a centroid is better looked at alone than with its leaf

}  // namespace

bool bounded(const Codebook& book, const Int8Book& quantised, const Leaves& leaves, Int8Scratch& scratch,
             const float* points, int count, int64_t* out) {
  Quantised block;
  if (!quantise(book, quantised, points, count, scratch.bytes.data(), block)) return false;
  constexpr decltype(&sift<1>) kSift[] = {sift<1>, sift<2>, sift<3>, sift<4>};
  Survivor* const found = scratch.survivors.data();
  int64_t pairs;
  const int64_t n = kSift[block.vectors - 1](quantised, block, count, scratch.minima.data(), found, &pairs);
  // In instructions: looking into a group, and the float32 pass.
  const int64_t look = book.dim < kLongRow ? 2 * book.dim + 30 : book.dim / 4 + 100,
                pass = quantised.n_groups * book.dim;
  if (pairs * look > count * (pass + 1000)) return false;
  with_dim(book.dim, [&](auto dim) {
    using One = Search<decltype(dim)::value>;
    alignas(One) unsigned char room[sizeof(One) * kBlock];
    One* const searches = reinterpret_cast<One*>(room);
    for (int p = 0; p < count; ++p) new (searches + p) One(book, points + p * book.dim);
    for (int64_t i = 0; i < n; ++i)
      for (uint64_t rest = found[i].points; rest; rest &= rest - 1) {
        const int p = int(_mm_popcnt_u64(~rest & (rest - 1)));
        if (book.dim < kLongRow) {
          searches[p].open_leaf(leaves, found[i].group);
          continue;
        }
        for (unsigned left = left_in_group(quantised, block, found[i].group, p); left; left &= left - 1) {
          const int64_t j = found[i].group * kGroup + first_bit(left);
          if (j < book.k) searches[p].meet(int32_t(j), row_distance(book, points + p * book.dim, j));
        }
      }
    for (int p = 0; p < count; ++p) out[p] = searches[p].winner;
  });
  return true;
}

}  // namespace fastigpt::nearest_avx512vnni
