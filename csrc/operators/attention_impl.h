// Attention of one head over one sequence's cache, written once for all instruction sets and cache formats.
//
// Scores, softmax and the weighted sum of values are three walks: scores of all keys first (at most a few thousand), so
// that the largest is known and no running rescale is needed. Queries share the walks over keys and values, up to
// kMaxQueries at a time; keys after a query get the score −inf, hence weight 0, and leave its sums as they are.
#pragma once
#include "operators/kernels.h"
#include "simd/functions.h"
#include "simd/panels.h"

namespace fastigpt {
namespace FASTIGPT_ISA {
namespace {

template <DType N> struct CachePanel;
template <> struct CachePanel<DType::f32> { using P = PanelF32; };
template <> struct CachePanel<DType::bf16> { using P = PanelBf16; };
template <> struct CachePanel<DType::i8> { using P = PanelU8; };

// Queries or weights in the activation format of a cache panel, in one plane or (int8) two: x ≈ scale · (high + low /
// 256).
template <class P>
struct Planes {
  typename P::Elem* plane[2];
  float scale;
  int32_t sum[2];  // of the integers of each plane
};

struct AttendScratch {
  float* scores;     // [kMaxQueries][slots]
  uint8_t* planes;   // weights: [kMaxQueries][2][slots] elements of up to 4 bytes
  uint8_t* queries;  // [kMaxQueries][2][value_dim] elements
  float* out;        // [kMaxQueries][value_dim]
};

size_t attend_scratch(CacheShape shape, int slots) {
  const size_t dim = shape.value_dim();
  return kMaxQueries * (size_t(slots) * 4 + size_t(slots) * 8 + dim * 8 + dim * 4);
}

AttendScratch scratch_at(uint8_t* base, CacheShape shape, int slots) {
  const size_t dim = shape.value_dim();
  AttendScratch s;
  s.scores = reinterpret_cast<float*>(base);
  s.planes = base + kMaxQueries * size_t(slots) * 4;
  s.queries = s.planes + kMaxQueries * size_t(slots) * 8;
  s.out = reinterpret_cast<float*>(s.queries + kMaxQueries * dim * 8);
  return s;
}

// --- writing keys and values ------------------------------------------------------------------------------------------

// Dimensions [first, last) of the key at slot `at`. Other dimensions of it may be written by other threads meanwhile.
void put_key(CacheShape shape, const HeadCache& head, int at, const float* k, int first, int last) {
  const int block = at / kKeyBlock, lane = at % kKeyBlock, d = shape.head_dim;
  uint8_t* base = head.k + size_t(block) * shape.k_groups() * 64;
  if (shape.dtype == DType::f32) {
    float* to = reinterpret_cast<float*>(base) + lane;
    for (int i = first; i < last; ++i) to[i * 16] = k[i];
  } else if (shape.dtype == DType::bf16) {
    uint16_t* to = reinterpret_cast<uint16_t*>(base) + lane * 2;
    constexpr int kChunk = 64;
    uint16_t half[kChunk];
    for (; first < last; first += kChunk) {
      const int n = last - first < kChunk ? last - first : kChunk;
      for (int i = 0; i < n; ++i) half[i] = to_bf16(k[first + i]);
      int i = 0;
      if (first % 2) to[first / 2 * 32 + 1] = half[i++];
      for (; i + 2 <= n; i += 2) std::memcpy(to + (first + i) / 2 * 32, half + i, 4);
      if (i < n) to[(first + i) / 2 * 32] = half[i];
    }
  } else {  // the scale is of the whole key
    float largest = 0;
    for (int i = 0; i < d; ++i) largest = __builtin_fabsf(k[i]) > largest ? __builtin_fabsf(k[i]) : largest;
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    head.k_scale[at] = largest / 127.0f;
    uint8_t* to = base + lane * 4;
    for (int i = 0; i < d; ++i) to[(i / 4) * 64 + i % 4] = uint8_t(int(__builtin_rintf(k[i] * inverse)) + 128);
  }
}

// Likewise a value.
void put_value(CacheShape shape, const HeadCache& head, int at, const float* v, int first, int last) {
  const int d = shape.head_dim, group = group_size(shape.dtype);
  const size_t row = size_t(at / group) * shape.value_dim() * group;
  if (shape.dtype == DType::f32) {
    std::memcpy(reinterpret_cast<float*>(head.v) + row + first, v + first, (last - first) * sizeof(float));
  } else if (shape.dtype == DType::bf16) {
    // Two values share the words of a group; whole words can be written several at a time.
    uint32_t* to = reinterpret_cast<uint32_t*>(head.v) + row / 2;
    const int shift = at % 2 * 16;
    for (int i = first; i < last; ++i) to[i] = (to[i] & (0xffff0000u >> shift)) | uint32_t(to_bf16(v[i])) << shift;
  } else {
    float largest = 0;
    for (int i = 0; i < d; ++i) largest = __builtin_fabsf(v[i]) > largest ? __builtin_fabsf(v[i]) : largest;
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    head.v_scale[at] = largest / 127.0f;
    uint8_t* to = head.v + row + at % group;
    for (int i = 0; i < d; ++i) to[i * 4] = uint8_t(int(__builtin_rintf(v[i] * inverse)) + 128);
  }
}

// --- queries and weights as activations -------------------------------------------------------------------------------

// x: n floats (a multiple of 16, padded with zeros), none larger than `largest` in magnitude.
template <class P>
void make_planes(const float* x, int n, float largest, Planes<P>& to) {
  if constexpr (P::kPlanes == 1) {
    for (int i = 0; i < n; i += 16) store_act(to.plane[0] + i, load(x + i));
  } else {
    // high rounds x / scale, low rounds what is left, in steps of 1/256.
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    to.scale = largest / 127.0f;
    I16 sum_high = zeroi(), sum_low = zeroi();
    for (int i = 0; i < n; i += 16) {
      const F16 y = mul(load(x + i), set1(inverse));
      const I16 high = nearest(y);
      const I16 low = nearest(min(mul(sub(y, to_float(high)), set1(256.0f)), set1(127.0f)));
      sum_high = addi(sum_high, high);
      sum_low = addi(sum_low, low);
#if defined(__AVX512F__)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to.plane[0] + i), _mm512_cvtepi32_epi8(high));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to.plane[1] + i), _mm512_cvtepi32_epi8(low));
#else
      int32_t lanes[2][16];
      store(static_cast<void*>(lanes[0]), high);
      store(static_cast<void*>(lanes[1]), low);
      for (int p = 0; p < 2; ++p)
        for (int j = 0; j < 16; ++j) to.plane[p][i + j] = int8_t(lanes[p][j]);
#endif
    }
    to.sum[0] = reduce_add_i(sum_high);
    to.sum[1] = reduce_add_i(sum_low);
  }
}

// Sum of products as floats; int8: takes the offset of 128 out and joins the planes, still without its scales.
template <class P>
F16 finish(const typename P::Acc* acc, const Planes<P>& a) {
  if constexpr (P::kPlanes == 1) {
    return acc[0];
  } else {
    const F16 high = to_float(subi(acc[0], set1i(a.sum[0] * 128)));
    const F16 low = to_float(subi(acc[1], set1i(a.sum[1] * 128)));
    return fma(low, set1(1.0f / 256.0f), high);
  }
}

constexpr size_t kAhead = 8192;  // bytes between what is prefetched and what is used

// --- the walks --------------------------------------------------------------------------------------------------------

// Scores of Q queries against B blocks of keys. Prefetches as many bytes from `next`.
template <class P, int Q, int B>
void score_blocks(const uint8_t* keys, size_t block_bytes, int groups, const Planes<P>* q, const float* k_scale,
                  float* scores, size_t stride, const uint8_t* next) {
  typename P::Acc acc[Q][B][P::kPlanes];
  for (int i = 0; i < Q; ++i)
    for (int b = 0; b < B; ++b)
      for (int p = 0; p < P::kPlanes; ++p) acc[i][b][p] = P::none();
  for (int g = 0; g < groups; ++g) {
    I16 key[B];
    for (int b = 0; b < B; ++b) {
      key[b] = load(static_cast<const void*>(keys + b * block_bytes + size_t(g) * 64));
      prefetch(next + b * block_bytes + size_t(g) * 64);
    }
    for (int i = 0; i < Q; ++i)
      for (int p = 0; p < P::kPlanes; ++p) {
        const auto a = P::act(q[i].plane[p] + size_t(g) * P::kGroup);
        for (int b = 0; b < B; ++b) acc[i][b][p] = P::mac(acc[i][b][p], key[b], a);
      }
  }
  for (int i = 0; i < Q; ++i)
    for (int b = 0; b < B; ++b) {
      F16 s = finish<P>(acc[i][b], q[i]);
      if constexpr (P::kPlanes == 2) s = mul(s, mul(load(k_scale + b * 16), set1(q[i].scale)));
      store(scores + i * stride + b * 16, s);
    }
}

#if defined(__AVX512F__)
constexpr int kScoreQueries = 4;
template <class P> constexpr int kSoloBlocks = 4;
template <class P> constexpr int kSharedBlocks = P::kPlanes == 1 ? 4 : 2;
template <class P> constexpr int kSumQueries = P::kPlanes == 1 ? 4 : 2;
constexpr int kSumVectors = 4;
#else
constexpr int kScoreQueries = 2;
template <class P> constexpr int kSoloBlocks = P::kPlanes == 1 ? 4 : 2;
template <class P> constexpr int kSharedBlocks = P::kPlanes == 1 ? 2 : 1;
template <class P> constexpr int kSumQueries = 1;
constexpr int kSumVectors = 2;
#endif

template <class P, int Q>
void score_range(CacheShape shape, const HeadCache& head, int blocks, const Planes<P>* q, float* scores,
                 size_t stride) {
  constexpr int B = Q == 1 ? kSoloBlocks<P> : kSharedBlocks<P>;
  const int groups = shape.k_groups();
  const size_t bytes = size_t(groups) * 64;
  // After the last keys come the values.
  const int ahead = int(kAhead / bytes);
  auto soon = [&](int b) {
    return b + ahead < blocks ? head.k + (b + ahead) * bytes : head.v + (b + ahead - blocks) * bytes;
  };
  int b = 0;
  for (; b + B <= blocks; b += B)
    score_blocks<P, Q, B>(head.k + b * bytes, bytes, groups, q, head.k_scale + b * 16, scores + b * 16, stride,
                          soon(b));
  for (; b < blocks; ++b)
    score_blocks<P, Q, 1>(head.k + b * bytes, bytes, groups, q, head.k_scale + b * 16, scores + b * 16, stride,
                          soon(b));
}

// As many queries at once as there are, at most Q.
template <class P, int Q>
void score_queries(int queries, CacheShape shape, const HeadCache& head, int blocks, const Planes<P>* q, float* scores,
                   size_t stride) {
  if constexpr (Q > 1)
    if (queries < Q) return score_queries<P, Q - 1>(queries, shape, head, blocks, q, scores, stride);
  score_range<P, Q>(shape, head, blocks, q, scores, stride);
}

struct Segment {
  const HeadCache* head;
  int first, blocks;  // first block, counted from the start of the sequence
};

// Σ weight · value for Q queries and V × 16 dimensions, over all segments.
template <class P, int Q, int V>
void sum_values(CacheShape shape, const Segment* segments, int dim0, const Planes<P>* w, float* out, size_t out_stride,
                const uint8_t* next) {
  typename P::Acc acc[Q][V][P::kPlanes];
  for (int i = 0; i < Q; ++i)
    for (int v = 0; v < V; ++v)
      for (int p = 0; p < P::kPlanes; ++p) acc[i][v][p] = P::none();
  const size_t step = size_t(shape.value_dim()) / 16 * 64;  // bytes of one group of keys
  for (int s = 0; s < 2; ++s) {
    const uint8_t* values = segments[s].head->v + size_t(dim0) / 16 * 64;
    const int g0 = segments[s].first * (kKeyBlock / P::kGroup);
    const int groups = segments[s].blocks * (kKeyBlock / P::kGroup);
    const int ahead = int(kAhead / step);
    for (int g = 0; g < groups; ++g, values += step) {
      I16 value[V];
      const uint8_t* soon = g + ahead < groups ? values + ahead * step : next + (g + ahead - groups) * step;
      for (int v = 0; v < V; ++v) {
        value[v] = load(static_cast<const void*>(values + v * 64));
        prefetch(soon + v * 64);
      }
      for (int i = 0; i < Q; ++i)
        for (int p = 0; p < P::kPlanes; ++p) {
          const auto a = P::act(w[i].plane[p] + size_t(g0 + g) * P::kGroup);
          for (int v = 0; v < V; ++v) acc[i][v][p] = P::mac(acc[i][v][p], value[v], a);
        }
    }
  }
  for (int i = 0; i < Q; ++i)
    for (int v = 0; v < V; ++v) store(out + i * out_stride + dim0 + v * 16, finish<P>(acc[i][v], w[i]));
}

template <class P, int Q>
void sum_all_values(int queries, CacheShape shape, const Segment* segments, const Planes<P>* w, float* out,
                    size_t out_stride, const uint8_t* next) {
  if constexpr (Q > 1)
    if (queries < Q) return sum_all_values<P, Q - 1>(queries, shape, segments, w, out, out_stride, next);
  int d = 0;
  const int dim = shape.value_dim();
  for (; d + kSumVectors * 16 <= dim; d += kSumVectors * 16)
    sum_values<P, Q, kSumVectors>(shape, segments, d, w, out, out_stride, next);
  for (; d < dim; d += 16) sum_values<P, Q, 1>(shape, segments, d, w, out, out_stride, next);
}

// Turns the scores of a query that sees `keys` keys into weights, padded with zeros to `padded`; returns 1 / their sum.
template <class P>
float softmax(float* scores, int keys, int padded, const HeadCache* const* scale_of, int begin, Planes<P>& to) {
  for (int i = keys; i < padded; ++i) scores[i] = -__builtin_inff();
  F16 most = set1(-__builtin_inff());
  for (int i = 0; i < padded; i += 16) most = max(most, load(scores + i));
  const F16 largest = set1(reduce_max(most));
  F16 sum = zero();
  if constexpr (P::kPlanes == 1) {
    for (int i = 0; i < padded; i += 16) {
      F16 e = exp16(sub(load(scores + i), largest));
#if defined(__AVX512BF16__)
      if constexpr (P::kGroup == 2) {
        // The sum is of the weights as they are used, rounded.
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(e);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.plane[0] + i), half);
        e = as_float(shift_left<16>(_mm512_cvtepu16_epi32(half)));
      } else {
        store_act(to.plane[0] + i, e);
      }
#else
      store_act(to.plane[0] + i, e);
#endif
      sum = add(sum, e);
    }
    return 1.0f / reduce_add(sum);
  } else {
    // The scale of each value goes into its weight.
    F16 heaviest = zero();
    for (int i = 0; i < padded; i += 16) {
      const F16 e = exp16(sub(load(scores + i), largest));
      sum = add(sum, e);
      const float* scale = i < begin ? scale_of[0]->v_scale + i : scale_of[1]->v_scale + (i - begin);
      const F16 w = mul(e, load(scale));
      heaviest = max(heaviest, w);
      store(scores + i, w);
    }
    make_planes<P>(scores, padded, reduce_max(heaviest), to);
    return to.scale / reduce_add(sum);
  }
}

template <class P>
void attend_as(const Attend& job) {
  const CacheShape shape = job.shape;
  const int d = shape.head_dim, dim = shape.value_dim();
  const auto seen_by = [&](int query) { return job.slot + (job.first + query) / job.group + 1; };  // keys
  const int slots = (seen_by(job.count - 1) + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
  const AttendScratch scratch = scratch_at(job.scratch, shape, slots);
  const float q_scale = 1.0f / __builtin_sqrtf(float(d));
  const HeadCache* heads[2] = {&job.prefix, &job.own};
  for (int first = 0; first < job.count; first += kMaxQueries) {
    const int queries = job.count - first < kMaxQueries ? job.count - first : kMaxQueries;
    const int padded = (seen_by(first + queries - 1) + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
    const Segment segments[2] = {{&job.prefix, 0, job.begin / kKeyBlock},
                                 {&job.own, job.begin / kKeyBlock, (padded - job.begin) / kKeyBlock}};
    Planes<P> q[kMaxQueries], w[kMaxQueries];
    float inverse[kMaxQueries];
    for (int i = 0; i < queries; ++i) {
      float* padded_q = scratch.out + i * dim;
      const int query = job.first + first + i;
      const float* from = job.q + query / job.group * job.qkv_stride + query % job.group * d;
      float largest = 0;
      for (int j = 0; j < d; ++j) padded_q[j] = from[j] * q_scale;
      for (int j = d; j < dim; ++j) padded_q[j] = 0;
      if constexpr (P::kPlanes == 2)
        for (int j = 0; j < d; ++j)
          largest = __builtin_fabsf(padded_q[j]) > largest ? __builtin_fabsf(padded_q[j]) : largest;
      for (int p = 0; p < P::kPlanes; ++p) {
        q[i].plane[p] = reinterpret_cast<typename P::Elem*>(scratch.queries) + (i * 2 + p) * size_t(dim);
        w[i].plane[p] = reinterpret_cast<typename P::Elem*>(scratch.planes) + (i * 2 + p) * size_t(slots);
      }
      make_planes<P>(padded_q, dim, largest, q[i]);
    }
    for (int s = 0; s < 2; ++s) {
      float* scores = scratch.scores + segments[s].first * kKeyBlock;
      for (int i = 0; i < queries; i += kScoreQueries)
        score_queries<P, kScoreQueries>(queries - i, shape, *segments[s].head, segments[s].blocks, q + i,
                                        scores + i * size_t(slots), slots);
    }
    for (int i = 0; i < queries; ++i)
      inverse[i] = softmax<P>(scratch.scores + i * size_t(slots), seen_by(first + i), padded, heads, job.begin, w[i]);
    for (int i = 0; i < queries; i += kSumQueries<P>)
      sum_all_values<P, kSumQueries<P>>(queries - i, shape, segments, w + i, scratch.out + i * dim, dim, job.next);
    for (int i = 0; i < queries; ++i) {
      float* y = scratch.out + i * dim;
      const int row = (job.first + first + i) / job.group, column = (job.first + first + i) % job.group * d;
      for (int j = 0; j < dim; j += 16) store(y + j, mul(load(y + j), set1(inverse[i])));
      if (!job.out_rows.data) {
        std::memcpy(job.out_floats + row * job.out_stride + column, y, d * sizeof(float));
      } else if (job.out_dtype == DType::f32 || sizeof(PanelBf16::Elem) == 4) {
        std::memcpy(job.out_rows.data + row * job.out_rows.stride + column * sizeof(float), y, d * sizeof(float));
      } else {
        auto to = reinterpret_cast<uint16_t*>(job.out_rows.data + row * job.out_rows.stride) + column;
        for (int j = 0; j < d; ++j) to[j] = to_bf16(y[j]);
      }
    }
  }
}

void attend(const Attend& job) {
  if (job.shape.dtype == DType::f32)
    attend_as<PanelF32>(job);
  else if (job.shape.dtype == DType::bf16)
    attend_as<PanelBf16>(job);
  else
    attend_as<PanelU8>(job);
}

}  // namespace
}  // namespace FASTIGPT_ISA
}  // namespace fastigpt
