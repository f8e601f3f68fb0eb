// Attention of one head over keys and values that lie as rows, [slot][head_dim], the layout of other people's caches:
// no packing, so that one call works on a cache that nobody prepared. Written once for all instruction sets.
//
// As in attention_impl.h all scores come first, then the softmax, then the weighted sum of values. Keys and values are
// walked in chunks that stay in the first-level cache while all queries of a window use them: memory is read once.
#pragma once
#include <type_traits>

#include "operators/kernels.h"
#include "simd/functions.h"
#include "simd/panels.h"

namespace fastigpt {
namespace FASTIGPT_ISA {
namespace {

// A piece of a row as vectors of floats. Of bfloat16 two numbers lie in each lane, and taking them apart in place costs
// one instruction for sixteen numbers where spreading them out costs two: so a piece is its even numbers and its odd
// ones, and queries and sums are kept in that order.
template <class T> struct Piece;
template <> struct Piece<float> {
  static constexpr int kVectors = 1;
  static void get(const float* p, F16* to) { to[0] = load(p); }
};
template <> struct Piece<uint16_t> {
  static constexpr int kVectors = 2;
  static void get(const uint16_t* p, F16* to) {
    const I16 pairs = load(static_cast<const void*>(p));
    to[0] = as_float(shift_left<16>(pairs));
    to[1] = as_float(andi(pairs, set1i(int32_t(0xffff0000u))));
  }
};
template <> struct Piece<int8_t> {
  static constexpr int kVectors = 1;
  static void get(const int8_t* p, F16* to) {
#if defined(__AVX512F__)
    to[0] = to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    to[0] = to_float(I16{_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))});
#else
    int32_t wide[16];
    for (int i = 0; i < 16; ++i) wide[i] = p[i];
    to[0] = to_float(load(static_cast<const void*>(wide)));
#endif
  }
};

template <class T> constexpr int kPiece = 16 * Piece<T>::kVectors;  // numbers

// Where number d of a row stands in a row kept in pieces.
template <class T>
inline int place(int d) {
  constexpr int kV = Piece<T>::kVectors;
  return d / kPiece<T> * kPiece<T> + d % kV * 16 + d % kPiece<T> / kV;
}

// The last numbers of a row, fewer than a piece: zeros stand for the rest, and nothing behind the row is read.
template <class T>
inline void get_some(const T* p, int n, F16* to) {
  T padded[kPiece<T>] = {};
  std::memcpy(padded, p, size_t(n) * sizeof(T));
  Piece<T>::get(padded, to);
}

template <class T>
inline void get_at(const T* row, int d, int head_dim, F16* to) {
  if (d + kPiece<T> <= head_dim)
    Piece<T>::get(row + d, to);
  else
    get_some(row + d, head_dim - d, to);
}

// Lane i of the result is the sum of the lanes of x[i].
inline F16 sums(const F16* x) {
#if defined(__AVX512F__)
  F16 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)  // pairs of rows: lanes alternate between the two
    a[i] = add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {  // fours: each 128-bit quarter holds one sum of each row
    const __m512d lo = _mm512_castps_pd(a[2 * i]), hi = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi)), _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi)));
  }
  for (int i = 0; i < 2; ++i)  // quarters 0 + 1 and 2 + 3
    c[i] = add(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return add(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
#else
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = reduce_add(x[i]);
  return load(lanes);
#endif
}

constexpr int kRowChunk = 64;  // keys that all queries use before the next are read

// Into the second-level cache: `bytes` from `soon` on, which may be null and may reach past the end of what it is in.
inline void prefetch_run(const uint8_t* soon, size_t bytes) {
  if (!soon) return;
  for (size_t i = 0; i < bytes; i += 64) prefetch(soon + i);
}

// Scores of Q queries (1, 2 or 4) against 16 / Q keys, in one vector: first all keys of query 0.
template <class T, int Q>
inline F16 score_rows(const T* keys, int head_dim, const float* q, size_t q_stride) {
  constexpr int kKeys = 16 / Q, kV = Piece<T>::kVectors;
  F16 acc[16];
  for (int i = 0; i < 16; ++i) acc[i] = zero();
  const auto add_piece = [&](int d, auto get) {
    F16 query[Q][kV];
    for (int i = 0; i < Q; ++i)
      for (int v = 0; v < kV; ++v) query[i][v] = load(q + i * q_stride + d + v * 16);
    for (int j = 0; j < kKeys; ++j) {
      F16 key[kV];
      get(keys + size_t(j) * head_dim + d, key);
      for (int i = 0; i < Q; ++i)
        for (int v = 0; v < kV; ++v) acc[i * kKeys + j] = fma(key[v], query[i][v], acc[i * kKeys + j]);
    }
  };
  int d = 0;
  for (; d + kPiece<T> <= head_dim; d += kPiece<T>) add_piece(d, [](const T* p, F16* to) { Piece<T>::get(p, to); });
  if (d < head_dim) add_piece(d, [&](const T* p, F16* to) { get_some(p, head_dim - d, to); });
  return sums(acc);
}

// scores[i][j] for Q queries and n keys. q: rows in pieces, padded with zeros. soon: what is read after, or null.
template <class T, int Q>
void score_chunk(const T* keys, int n, int head_dim, const float* q, size_t q_stride, float* scores, size_t stride,
                 const uint8_t* soon) {
  constexpr int kKeys = 16 / Q;
  const size_t bytes = kKeys * size_t(head_dim) * sizeof(T);
  float found[16];
  int j = 0;
  for (; j + kKeys <= n; j += kKeys, soon += soon ? bytes : 0) {
    prefetch_run(soon, bytes);
    const F16 s = score_rows<T, Q>(keys + size_t(j) * head_dim, head_dim, q, q_stride);
    if constexpr (Q == 1) {
      store(scores + j, s);
    } else {
      store(found, s);
      for (int i = 0; i < Q; ++i) std::memcpy(scores + i * stride + j, found + i * kKeys, kKeys * sizeof(float));
    }
  }
  for (; j < n; ++j)  // keys behind the last may not be ours to read
    for (int i = 0; i < Q; ++i) {
      F16 acc = zero(), key[Piece<T>::kVectors];
      for (int d = 0; d < head_dim; d += kPiece<T>) {
        get_at(keys + size_t(j) * head_dim, d, head_dim, key);
        for (int v = 0; v < Piece<T>::kVectors; ++v) acc = fma(key[v], load(q + i * q_stride + d + v * 16), acc);
      }
      scores[i * stride + j] = reduce_add(acc);
    }
}

// out[i] += Σⱼ weights[i][j] · values[j] for Q queries and S pieces of a row; out in pieces as well.
template <class T, int Q, int S>
void sum_chunk(const T* values, int n, int head_dim, const float* weights, size_t stride, float* out, size_t out_stride,
               const uint8_t* soon) {
  constexpr int kV = Piece<T>::kVectors, V = S * kV;
  F16 acc[Q][V];
  for (int i = 0; i < Q; ++i)
    for (int v = 0; v < V; ++v) acc[i][v] = load(out + i * out_stride + v * 16);
  for (int j = 0; j < n; ++j) {
    F16 value[V];
    prefetch_run(soon ? soon + size_t(j) * head_dim * sizeof(T) : nullptr, S * kPiece<T> * sizeof(T));
    for (int s = 0; s < S; ++s) Piece<T>::get(values + size_t(j) * head_dim + s * kPiece<T>, value + s * kV);
    for (int i = 0; i < Q; ++i) {
      const F16 weight = set1(weights[i * stride + j]);
      for (int v = 0; v < V; ++v) acc[i][v] = fma(value[v], weight, acc[i][v]);
    }
  }
  for (int i = 0; i < Q; ++i)
    for (int v = 0; v < V; ++v) store(out + i * out_stride + v * 16, acc[i][v]);
}

template <class T, int Q>
void sum_rows(const T* values, int n, int head_dim, const float* weights, size_t stride, float* out, size_t out_stride,
              const uint8_t* soon) {
  constexpr int kMany = 4 / Piece<T>::kVectors;
  int d = 0;
  const auto later = [&] { return soon ? soon + d * sizeof(T) : nullptr; };
  for (; d + kMany * kPiece<T> <= head_dim; d += kMany * kPiece<T>)
    sum_chunk<T, Q, kMany>(values + d, n, head_dim, weights, stride, out + d, out_stride, later());
  for (; d + kPiece<T> <= head_dim; d += kPiece<T>)
    sum_chunk<T, Q, 1>(values + d, n, head_dim, weights, stride, out + d, out_stride, later());
  if (d < head_dim)
    for (int j = 0; j < n; ++j) {
      F16 value[Piece<T>::kVectors];
      get_some(values + size_t(j) * head_dim + d, head_dim - d, value);
      for (int i = 0; i < Q; ++i)
        for (int v = 0; v < Piece<T>::kVectors; ++v) {
          float* to = out + i * out_stride + d + v * 16;
          store(to, fma(value[v], set1(weights[i * stride + j]), load(to)));
        }
    }
}

// What is read after the chunk that begins at `first`: the next one, or what comes when this segment has been walked.
template <class T>
const uint8_t* after(const void* rows, const RowSegment& s, int first, int head_dim, const void* then) {
  if (first + kRowChunk >= s.slots) return static_cast<const uint8_t*>(then);
  return reinterpret_cast<const uint8_t*>(static_cast<const T*>(rows) + size_t(first + kRowChunk) * head_dim);
}

// work(tile, i, soon) for queries i on, four at a time, then two, then one (tile is a constant); the first ones fetch
// what comes after.
template <class Work>
void in_tiles(int queries, const uint8_t* soon, Work work) {
  int i = 0;
  for (; queries - i >= 4; i += 4, soon = nullptr) work(std::integral_constant<int, 4>(), i, soon);
  for (; queries - i >= 2; i += 2, soon = nullptr) work(std::integral_constant<int, 2>(), i, soon);
  for (; queries - i >= 1; i += 1, soon = nullptr) work(std::integral_constant<int, 1>(), i, soon);
}

template <class T>
void walk_keys(const RowSegment& s, int first, int n, int head_dim, int queries, const float* q, size_t q_stride,
               float* scores, size_t stride, const uint8_t* soon) {
  const T* keys = static_cast<const T*>(s.k) + size_t(first) * head_dim;
  in_tiles(queries, soon, [&](auto tile, int i, const uint8_t* later) {
    score_chunk<T, tile()>(keys, n, head_dim, q + i * q_stride, q_stride, scores + i * stride, stride, later);
  });
}

template <class T>
void walk_values(const RowSegment& s, int first, int n, int head_dim, int queries, const float* weights, size_t stride,
                 float* out, size_t out_stride, const uint8_t* soon) {
  const T* values = static_cast<const T*>(s.v) + size_t(first) * head_dim;
  in_tiles(queries, soon, [&](auto tile, int i, const uint8_t* later) {
    sum_rows<T, tile()>(values, n, head_dim, weights + i * stride, stride, out + i * out_stride, out_stride, later);
  });
}

template <class T>
void product_rows_as(const void* rows, int n, int width, const float* x, int count, float* out, size_t stride,
                     float* scratch) {
  const int dim = (width + 31) / 32 * 32;
  std::memset(scratch, 0, size_t(count) * dim * sizeof(float));
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < width; ++j) scratch[size_t(i) * dim + place<T>(j)] = x[size_t(i) * width + j];
  RowSegment all;
  all.k = rows;
  all.slots = n;
  for (int first = 0; first < n; first += kRowChunk)
    walk_keys<T>(all, first, n - first < kRowChunk ? n - first : kRowChunk, width, count, scratch, dim, out + first,
                 stride, after<T>(rows, all, first, width, nullptr));
}

void product_rows(const void* rows, DType stored, int n, int width, const float* x, int count, float* out,
                  size_t stride, float* scratch) {
  if (stored == DType::f32)
    product_rows_as<float>(rows, n, width, x, count, out, stride, scratch);
  else
    product_rows_as<uint16_t>(rows, n, width, x, count, out, stride, scratch);
}

inline float value_at(const void* base, size_t i, DType dtype) {
  if (dtype == DType::f32) return static_cast<const float*>(base)[i];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(base)[i]) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// A key or value row of `d` numbers into slot `at`. int8: scale = largest / 127, ties away from zero.
void put_row(const void* from, DType dtype, int d, void* cache, float* scales, size_t at, DType stored) {
  if (stored != DType::i8) {
    const size_t bytes = d * size_of(stored);
    std::memcpy(static_cast<uint8_t*>(cache) + at * bytes, from, bytes);
    return;
  }
  float largest = 0;
  for (int i = 0; i < d; ++i) {
    const float x = __builtin_fabsf(value_at(from, i, dtype));
    largest = x > largest ? x : largest;
  }
  const float scale = largest > 0 ? largest / 127.0f : 1.0f;
  scales[at] = scale;
  int8_t* to = static_cast<int8_t*>(cache) + at * d;
  for (int i = 0; i < d; ++i) {
    const float x = value_at(from, i, dtype) / scale;
    const int32_t rounded = int32_t(__builtin_fabsf(x) + 0.5f);
    to[i] = int8_t(x < 0 ? -rounded : rounded);
  }
}

size_t attend_rows_scratch(int count, int keys, int head_dim) {
  const size_t dim = (head_dim + 31) / 32 * 32;
  return size_t(count) * (2 * dim + (keys + 15) / 16 * 16) * sizeof(float);
}

template <class T>
void attend_rows_as(const AttendRows& job) {
  const int d = job.head_dim, dim = (d + 31) / 32 * 32, count = job.count;
  const int known = job.segments[0].slots, keys = known + job.segments[1].slots;  // the last query sees all of them
  const size_t stride = size_t(keys + 15) / 16 * 16;
  float* q = job.scratch;
  float* out = q + size_t(count) * dim;
  float* scores = out + size_t(count) * dim;
  std::memset(q, 0, 2 * size_t(count) * dim * sizeof(float));  // and out behind it
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < d; ++j) q[i * dim + place<T>(j)] = value_at(job.q, i * job.q_stride + j, job.dtype) * job.scale;
  const RowSegment *prefix = &job.segments[0], *own = &job.segments[1];
  const void* values = prefix->slots ? prefix->v : own->v;
  int before = 0;
  for (const RowSegment& s : job.segments) {
    for (int first = 0; first < s.slots; first += kRowChunk) {
      const int n = s.slots - first < kRowChunk ? s.slots - first : kRowChunk;
      float* to = scores + before + first;
      walk_keys<T>(s, first, n, d, count, q, dim, to, stride,
                   after<T>(s.k, s, first, d, &s == prefix ? own->k : values));
      if (s.k_scale)
        for (int i = 0; i < count; ++i)
          for (int j = 0; j < n; ++j) to[i * stride + j] *= s.k_scale[first + j];
    }
    before += s.slots;
  }
  float inverse[kMaxRows];
  for (int i = 0; i < count; ++i) {
    float* row = scores + i * stride;
    const int seen = keys - (count - 1 - i);
    for (int j = seen; j < int(stride); ++j) row[j] = -__builtin_inff();
    F16 most = set1(-__builtin_inff());
    for (size_t j = 0; j < stride; j += 16) most = max(most, load(row + j));
    const F16 largest = set1(reduce_max(most));
    F16 sum = zero();
    for (size_t j = 0; j < stride; j += 16) {
      const F16 e = exp16(sub(load(row + j), largest));
      sum = add(sum, e);
      store(row + j, e);
    }
    inverse[i] = 1.0f / reduce_add(sum);
  }
  before = 0;
  for (const RowSegment& s : job.segments) {
    for (int first = 0; first < s.slots; first += kRowChunk) {
      const int n = s.slots - first < kRowChunk ? s.slots - first : kRowChunk;
      float* weights = scores + before + first;
      if (s.v_scale)
        for (int i = 0; i < count; ++i)
          for (int j = 0; j < n; ++j) weights[i * stride + j] *= s.v_scale[first + j];
      walk_values<T>(s, first, n, d, count, weights, stride, out, dim,
                     after<T>(s.v, s, first, d, &s == prefix ? own->v : job.next));
    }
    before += s.slots;
  }
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < d; ++j) {
      const float y = out[i * dim + place<T>(j)] * inverse[i];
      const size_t at = i * job.out_stride + j;
      if (job.dtype == DType::f32)
        static_cast<float*>(job.out)[at] = y;
      else
        static_cast<uint16_t*>(job.out)[at] = to_bf16(y);
    }
}

void attend_rows(const AttendRows& job) {
  if (job.stored == DType::f32)
    attend_rows_as<float>(job);
  else if (job.stored == DType::bf16)
    attend_rows_as<uint16_t>(job);
  else
    attend_rows_as<int8_t>(job);
}

}  // namespace
}  // namespace FASTIGPT_ISA
}  // namespace fastigpt
