// Nearest centroid on the GPU: brute force in float32 with float64 where float32 cannot decide, and the table of
// colours.
//
// Up to 16 dimensions a thread keeps its points in registers and all threads of a block walk through the centroids,
// which lie in shared memory and are read as broadcasts. Above that, a block of 64 points meets 64 centroids at a time,
// each thread with a 4 x 4 corner of the distances. Distances are direct, (x - c)^2 with fused multiply-adds: |c|^2 -
// 2x.c would cancel. Each thread keeps the least distance and the second least; where they are within rounding of one
// another the point is settled again in float64, the lowest index winning ties, as on the CPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/shared_memory.h"
#include "fastigpt/nearest_centroid.h"

namespace fastigpt {
namespace {

constexpr int kThreads = 256;

// Points with at most three axes, by value to the kernel. Missing axes come first, with extent 1.
struct View {
  const char* data;
  int64_t n, shape[kMaxAxes], strides[kMaxAxes], dim_stride;
  int dim;
  DType dtype;

  __device__ const char* at(int64_t i) const {
    const int64_t row = i / shape[2];
    return data + (i - row * shape[2]) * strides[2] + row % shape[1] * strides[1] + row / shape[1] * strides[0];
  }
};

// Coordinate d of the point at p, widened.
__device__ float coordinate(const View& view, const char* p, int d) {
  p += d * view.dim_stride;
  switch (view.dtype) {
    case DType::u8: return *reinterpret_cast<const uint8_t*>(p);
    case DType::f16: return __half2float(*reinterpret_cast<const __half*>(p));
    case DType::bf16: return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(p));
    default: return *reinterpret_cast<const float*>(p);
  }
}

__device__ double direct(const View& view, const char* p, const float* c) {
  double sum = 0;
  for (int d = 0; d < view.dim; ++d) {
    const double t = double(coordinate(view, p, d)) - c[d];
    sum = fma(t, t, sum);
  }
  return sum;
}

// Are the two least distances so close that float32 may have them the wrong way round?
__device__ bool undecided(float best, float second, int dim) {
  return second <= best * (1 + (dim + 6) * 4.0f / (1 << 24)) + 1e-30f;
}

__device__ void consider(float d2, int64_t j, float& best, float& second, int& index) {
  second = fminf(second, fmaxf(best, d2));
  if (d2 < best) best = d2, index = int(j);
}

// kDim: 3, 4, 8 or 16; points of fewer dimensions are padded with zeros, as are the centroids.
template <int kDim, int kPoints>
__global__ void __launch_bounds__(kThreads, 2)
    nearest_few_dimensions(View view, const float* __restrict__ centroids, int k, int64_t* __restrict__ indices,
                           float* __restrict__ distances) {
  constexpr int kRow = (kDim + 3) / 4 * 4, kTile = 4096 / kRow;
  FASTIGPT_SHARED(tile, float4[kTile * kRow / 4]);
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kPoints;
  float x[kPoints][kDim], best[kPoints], second[kPoints];
  int index[kPoints];
#pragma unroll
  for (int p = 0; p < kPoints; ++p) {
    const char* from = view.at(min(first + p, view.n - 1));
#pragma unroll
    for (int d = 0; d < kDim; ++d) x[p][d] = d < view.dim ? coordinate(view, from, d) : 0;
    best[p] = second[p] = INFINITY;
    index[p] = -1;
  }
  for (int start = 0; start < k; start += kTile) {
    const int here = min(kTile, k - start);
    __syncthreads();
    for (int i = threadIdx.x; i < here * kRow; i += kThreads) {
      const int d = i % kRow;
      reinterpret_cast<float*>(tile)[i] = d < view.dim ? centroids[int64_t(start + i / kRow) * view.dim + d] : 0;
    }
    __syncthreads();
#pragma unroll 2
    for (int j = 0; j < here; ++j) {
      float c[kRow];
#pragma unroll
      for (int q = 0; q < kRow / 4; ++q) {
        const float4 four = tile[j * (kRow / 4) + q];
        c[4 * q] = four.x, c[4 * q + 1] = four.y, c[4 * q + 2] = four.z, c[4 * q + 3] = four.w;
      }
#pragma unroll
      for (int p = 0; p < kPoints; ++p) {
        float d2 = 0;
#pragma unroll
        for (int d = 0; d < kDim; ++d) {
          const float t = x[p][d] - c[d];
          d2 = fmaf(t, t, d2);
        }
        consider(d2, start + j, best[p], second[p], index[p]);
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kPoints; ++p) {
    if (first + p >= view.n) break;
    double exact = best[p];
    if (index[p] >= 0 && (distances || undecided(best[p], second[p], kDim))) {
      const char* from = view.at(first + p);
      if (undecided(best[p], second[p], kDim)) {
        exact = INFINITY;
        for (int j = 0; j < k; ++j) {
          const double d2 = direct(view, from, centroids + int64_t(j) * view.dim);
          if (d2 < exact) exact = d2, index[p] = j;
        }
      } else {
        exact = direct(view, from, centroids + int64_t(index[p]) * view.dim);
      }
    }
    indices[first + p] = index[p];
    if (distances) distances[first + p] = index[p] < 0 ? NAN : float(exact);
  }
}

__global__ void __launch_bounds__(kThreads)
    nearest_many_dimensions(View view, const float* __restrict__ centroids, int k, int64_t* __restrict__ indices,
                            float* __restrict__ distances) {
  constexpr int kSide = 64, kDepth = 16, kCorner = 4;
  FASTIGPT_SHARED(xs, float[kDepth][kSide + 1]);
  FASTIGPT_SHARED(cs, float[kDepth][kSide + 1]);
  FASTIGPT_SHARED(bests, float[kSide][17]);
  FASTIGPT_SHARED(seconds, float[kSide][17]);
  FASTIGPT_SHARED(winners, int[kSide][17]);
  FASTIGPT_SHARED(low, double[kThreads]);
  FASTIGPT_SHARED(low_index, int[kThreads]);
  // This thread's points: row + 16 i, centroids: column + 16 j.
  const int row = threadIdx.x / 16, column = threadIdx.x % 16;
  const int64_t first = int64_t(blockIdx.x) * kSide;
  float best[kCorner], second[kCorner];
  int index[kCorner];
  for (int i = 0; i < kCorner; ++i) best[i] = second[i] = INFINITY, index[i] = -1;

  for (int start = 0; start < k; start += kSide) {
    float acc[kCorner][kCorner] = {};
    for (int d0 = 0; d0 < view.dim; d0 += kDepth) {
      __syncthreads();
      for (int i = threadIdx.x; i < kSide * kDepth; i += kThreads) {
        const int d = d0 + i % kDepth, at = i / kDepth;
        const bool inside = d < view.dim;
        xs[i % kDepth][at] = inside && first + at < view.n ? coordinate(view, view.at(first + at), d) : 0;
        cs[i % kDepth][at] = inside && start + at < k ? centroids[int64_t(start + at) * view.dim + d] : 0;
      }
      __syncthreads();
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        float c[kCorner];
#pragma unroll
        for (int j = 0; j < kCorner; ++j) c[j] = cs[d][column + 16 * j];
#pragma unroll
        for (int i = 0; i < kCorner; ++i) {
          const float x = xs[d][row + 16 * i];
#pragma unroll
          for (int j = 0; j < kCorner; ++j) {
            const float t = x - c[j];
            acc[i][j] = fmaf(t, t, acc[i][j]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kCorner; ++i)
#pragma unroll
      for (int j = 0; j < kCorner; ++j)
        if (start + column + 16 * j < k) consider(acc[i][j], start + column + 16 * j, best[i], second[i], index[i]);
  }
  for (int i = 0; i < kCorner; ++i) {
    bests[row + 16 * i][column] = best[i];
    seconds[row + 16 * i][column] = second[i];
    winners[row + 16 * i][column] = index[i];
  }
  __syncthreads();
  // Every thread follows every point: the float64 part needs all.
  for (int p = 0; p < kSide && first + p < view.n; ++p) {
    float least = INFINITY, next = INFINITY;
    int winner = -1;
    for (int c = 0; c < 16; ++c) {
      const float b = bests[p][c];
      next = fminf(next, fminf(seconds[p][c], fmaxf(least, b)));
      if (b < least) least = b, winner = winners[p][c];
    }
    const char* from = view.at(first + p);
    double exact = INFINITY;
    if (winner >= 0 && undecided(least, next, view.dim)) {
      for (int j = threadIdx.x; j < k; j += kThreads) {
        const double d2 = direct(view, from, centroids + int64_t(j) * view.dim);
        if (d2 < exact) exact = d2, winner = j;
      }
      low[threadIdx.x] = exact;
      low_index[threadIdx.x] = winner;
      for (unsigned half = kThreads / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
          const double other = low[threadIdx.x + half];
          const int j = low_index[threadIdx.x + half];
          if (other < low[threadIdx.x] || (other == low[threadIdx.x] && j < low_index[threadIdx.x]))
            low[threadIdx.x] = other, low_index[threadIdx.x] = j;
        }
      }
      __syncthreads();
      winner = low_index[0];
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      indices[first + p] = winner;
      if (distances)
        distances[first + p] = winner < 0 ? NAN : float(direct(view, from, centroids + int64_t(winner) * view.dim));
    }
  }
}

__device__ uint32_t answer(const uint32_t* __restrict__ cells, const uint16_t* __restrict__ blocks, uint32_t r,
                           uint32_t g, uint32_t b) {
  const uint32_t cell = (r >> 2) << 12 | (g >> 2) << 6 | b >> 2, inside = (r & 3) << 4 | (g & 3) << 2 | (b & 3);
  return __ldg(blocks + __ldg(cells + cell) + inside);
}

__global__ void __launch_bounds__(kThreads)
    rgb_lookup(View view, const uint32_t* __restrict__ cells, const uint16_t* __restrict__ blocks,
               int64_t* __restrict__ indices) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= view.n) return;
  const uint8_t* p = reinterpret_cast<const uint8_t*>(view.at(i));
  indices[i] = answer(cells, blocks, p[0], p[view.dim_stride], p[2 * view.dim_stride]);
}

// Four neighbouring pixels of a packed row: three words in, two pairs of answers out.
__global__ void __launch_bounds__(kThreads)
    rgb_lookup_packed(const uint32_t* __restrict__ pixels, int64_t quads, const uint32_t* __restrict__ cells,
                      const uint16_t* __restrict__ blocks, longlong2* __restrict__ indices) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= quads) return;
  const uint32_t a = __ldg(pixels + 3 * i), b = __ldg(pixels + 3 * i + 1), c = __ldg(pixels + 3 * i + 2);
  const uint32_t w0 = answer(cells, blocks, a & 255, a >> 8 & 255, a >> 16 & 255);
  const uint32_t w1 = answer(cells, blocks, a >> 24, b & 255, b >> 8 & 255);
  const uint32_t w2 = answer(cells, blocks, b >> 16 & 255, b >> 24, c & 255);
  const uint32_t w3 = answer(cells, blocks, c >> 8 & 255, c >> 16 & 255, c >> 24);
  indices[2 * i] = make_longlong2(w0, w1);
  indices[2 * i + 1] = make_longlong2(w2, w3);
}

const char* to_view(const PointsView& points, View& view) {
  const int axes = int(points.shape.size());
  if (axes > kMaxAxes) return "points have more than three axes that are not one run in memory";
  view = {static_cast<const char*>(points.data),
          points.size(),
          {1, 1, 1},
          {0, 0, 0},
          points.dim_stride,
          int(points.dim),
          points.dtype};
  for (int axis = 0; axis < axes; ++axis) {
    view.shape[kMaxAxes - axes + axis] = points.shape[axis];
    view.strides[kMaxAxes - axes + axis] = points.strides[axis];
  }
  return nullptr;
}

// A block for every `per_block` of n. Null, or what CUDA has to complain about.
template <class... Parameters, class... Arguments>
const char* launch(void* stream, int64_t n, int64_t per_block, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = unsigned((n + per_block - 1) / per_block);
  config.blockDim = kThreads;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // told here: whoever asks CUDA next is not told again
  return cudaGetErrorString(error);
}

}  // namespace

const char* nearest_centroid_cuda(const PointsView& points, const float* centroids, int64_t k, int64_t* indices,
                                  float* distances, void* stream) {
  View view;
  if (const char* error = to_view(points, view)) return error;
  if (view.n == 0) return nullptr;
  const auto run = [&](int64_t points, auto kernel) {
    return launch(stream, view.n, points, kernel, view, centroids, int(k), indices, distances);
  };
  if (view.dim <= 3) return run(kThreads * 4, nearest_few_dimensions<3, 4>);
  if (view.dim == 4) return run(kThreads * 4, nearest_few_dimensions<4, 4>);
  if (view.dim <= 8) return run(kThreads * 2, nearest_few_dimensions<8, 2>);
  if (view.dim <= 16) return run(kThreads * 2, nearest_few_dimensions<16, 2>);
  return run(64, nearest_many_dimensions);
}

const char* rgb_lookup_cuda(const PointsView& points, const uint32_t* cells, const uint16_t* blocks, int64_t* indices,
                            void* stream) {
  View view;
  if (const char* error = to_view(points, view)) return error;
  if (view.n == 0) return nullptr;
  const bool packed = view.shape[0] * view.shape[1] == 1 && view.strides[2] == 3 && view.dim_stride == 1 &&
                      reinterpret_cast<uintptr_t>(view.data) % 4 == 0 && reinterpret_cast<uintptr_t>(indices) % 16 == 0;
  int64_t done = 0;
  if (packed && view.n >= 4) {
    const int64_t quads = view.n / 4;
    const char* error = launch(stream, quads, kThreads, rgb_lookup_packed, reinterpret_cast<const uint32_t*>(view.data),
                               quads, cells, blocks, reinterpret_cast<longlong2*>(indices));
    if (error) return error;
    done = quads * 4;
    view.data += done * 3;
    view.n -= done;
    view.shape[2] -= done;
  }
  return view.n ? launch(stream, view.n, kThreads, rgb_lookup, view, cells, blocks, indices + done) : nullptr;
}

}  // namespace fastigpt
