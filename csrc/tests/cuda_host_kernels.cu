// Small kernels that use all that csrc/cuda/host has, right by themselves and each with bugs that can be asked for;
// also compiled by nvcc, since what only one of the two compilers takes is worth nothing.
//
//   cuda_host_kernels KERNEL [BUG]       runs one and compares; 0: right, 1: wrong
//   cuda_host_kernels convert IN OUT     float32 values -> half, bfloat16 [n], then float32 of all halves, all bfloat16
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cuda/atomic>

#include "cuda/shared_memory.h"

namespace cg = cooperative_groups;

namespace cuda_host_kernels {

// --- products: y = W x, `steps` times over, W [rows, columns] of a square matrix. A cluster has a share of the rows
// and each of its blocks a share of the columns; partial sums meet in distributed shared memory, in the order of ranks;
// a barrier of the whole grid stands between the steps.

enum ProductsBug {
  kNoBug,
  kNoClusterSync,   // peers are read before they have written
  kLeavesEarly,     // and have ended while they are read
  kNoBlockBarrier,  // the one thread that arrives publishes its own stores only
  kRelaxedArrival,  // arrives without releasing
  kRelaxedWatch,    // sees the others without acquiring
  kNoGridBarrier,
  kLoadsPastCoherence,  // __ldg of what this launch writes
  kPastDynamicMemory,
  kUninitialisedSum,
};

__device__ void meet(unsigned* arrivals, unsigned& target, int bug) {
  if (bug == kNoGridBarrier) return;
  if (bug != kNoBlockBarrier) __syncthreads();  // all stores of the block come before its one arrival
  target += gridDim.x;
  if (threadIdx.x == 0) {
    const cuda::atomic_ref<unsigned, cuda::thread_scope_device> counter(*arrivals);
    counter.fetch_add(1, bug == kRelaxedArrival ? cuda::std::memory_order_relaxed : cuda::std::memory_order_release);
    while (counter.load(bug == kRelaxedWatch ? cuda::std::memory_order_relaxed : cuda::std::memory_order_acquire) <
           target)
      __nanosleep(20);
  }
  __syncthreads();
}

__global__ void products(const float* __restrict__ w, float* x, float* y, int n, int steps, unsigned* arrivals,
                         int bug) {
  FASTIGPT_DYNAMIC_SHARED(part, float);  // [rows of the cluster]
  const cg::cluster_group cluster = cg::this_cluster();
  const int size = int(cluster.num_blocks()), rank = int(cluster.block_rank());
  const int rows = n / (int(gridDim.x) / size), columns = n / size;
  const int first_row = int(blockIdx.x) / size * rows, first_column = rank * columns;
  unsigned target = 0;
  for (int step = 0; step < steps; ++step) {
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
      float sum = bug == kUninitialisedSum && step == 0 ? part[row] : 0;
      for (int c = first_column; c < first_column + columns; ++c)
        sum += __ldg(w + (first_row + row) * n + c) * (bug == kLoadsPastCoherence ? __ldg(x + c) : x[c]);
      part[bug == kPastDynamicMemory ? row + 1 : row] = sum;
    }
    if (bug != kNoClusterSync) cluster.sync();
    for (int row = rank * int(blockDim.x) + int(threadIdx.x); row < rows; row += size * int(blockDim.x)) {
      float sum = 0;
      for (int r = 0; r < size; ++r) sum += cluster.map_shared_rank(part, r)[row];
      y[first_row + row] = sum;
    }
    if (step + 1 < steps)
      meet(arrivals, target, bug);
    else if (bug != kLeavesEarly)
      cluster.barrier_wait(cluster.barrier_arrive());
    float* const swap = x;
    x = y;
    y = swap;
  }
}

// --- lanes: out [threads] gets what the lanes of each warp make together.

enum LanesBug { kShuffleForOrder = 1, kOutsideMask, kBarrierInBranch, kTornCount };

__global__ void lanes(int* out, int* count, int bug) {
  FASTIGPT_SHARED(seen, int[64]);
  FASTIGPT_SHARED(even, int);
  const int lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) even = 0;
  __syncthreads();
  // Sums of 32, of each half on its own (in branches that differ), and of groups of eight.
  int all = lane;
  for (int d = 16; d; d /= 2) all += __shfl_xor_sync(~0u, all, d);
  int half = lane;
  if (lane < 16) {
    for (int d = 8; d; d /= 2) half += __shfl_down_sync(0xffffu, half, d);
    half = __shfl_sync(0xffffu, half, bug == kOutsideMask ? 20 : 0);
  } else {
    for (int d = 8; d; d /= 2) half += __shfl_xor_sync(0xffff0000u, half, d);
  }
  const int before = __shfl_up_sync(~0u, lane, 1, 8);  // the first of eight keeps its own
  const unsigned odd = __ballot_sync(~0u, lane & 1);
  // A neighbour's value through shared memory.
  seen[threadIdx.x] = lane * lane;
  if (bug == kShuffleForOrder)
    all = __shfl_sync(~0u, all, lane);
  else
    __syncwarp();
  const int next = seen[threadIdx.x ^ 1];
  if (lane % 2 == 0) {
    if (bug == kTornCount)
      even = even + 1;
    else
      atomicAdd(&even, 1);
  }
  if (bug == kBarrierInBranch && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  const int any = __any_sync(~0u, lane == 3), every = __all_sync(~0u, lane == 3);
  out[threadIdx.x] = all + half * 1000 + before + next * 7 + int(odd == 0xaaaaaaaau) + any * 2 + every * 4;
  if (threadIdx.x == 0) atomicMax(count, even);
}

// --- vectors: four floats at a time; the last threads of the block have nothing to do and leave before the barrier.

enum VectorsBug { kMisaligned = 1, kPastTile, kTwoBlocks };

__global__ void vectors(const float* __restrict__ in, float* out, int quads, int bug) {
  FASTIGPT_SHARED(tile, float4[40]);
  const int i = int(threadIdx.x);
  if (i >= quads) return;
  tile[i] = *reinterpret_cast<const float4*>(in + 4 * i + (bug == kMisaligned ? 1 : 0));
  __syncthreads();
  const float4 other = tile[bug == kPastTile ? i + 8 : quads - 1 - i];
  reinterpret_cast<float4*>(out)[i] = make_float4(other.w, other.z, other.y, other.x);
}

}  // namespace cuda_host_kernels

#ifndef __CUDACC__
#include <cstdlib>
#include <string>

namespace cuda_host_kernels {
namespace {

int run_products(int bug) {
  const int n = 48, steps = 3;
  const unsigned blocks = 4, cluster = 2;
  std::vector<float> w(n * n), x(n), y(n);
  for (int i = 0; i < n * n; ++i) w[i] = float(i * 7 % 5 - 2);
  for (int i = 0; i < n; ++i) x[i] = float(i % 3);
  std::vector<float> want = x;
  for (int step = 0; step < steps; ++step) {
    std::vector<float> next(n);
    for (int row = 0; row < n; ++row)
      for (int c = 0; c < n; ++c) next[row] += w[row * n + c] * want[c];  // small integers: exact in any order
    want = next;
  }
  cuda_host::constants = {{reinterpret_cast<const char*>(w.data()), w.size() * 4}};
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {cluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = 32;
  config.dynamicSmemBytes = n / (blocks / cluster) * sizeof(float);
  config.attrs = attributes;
  config.numAttrs = 2;
  unsigned arrivals = 0;
  if (cudaLaunchKernelEx(&config, products, w.data(), x.data(), y.data(), n, steps, &arrivals, bug)) return 1;
  int wrong = 0;
  for (int i = 0; i < n; ++i) wrong += !((steps % 2 ? y : x)[i] == want[i]);
  return wrong != 0;
}

int run_lanes(int bug) {
  std::vector<int> out(64);
  int count = 0;
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = 64;
  if (cudaLaunchKernelEx(&config, lanes, out.data(), &count, bug)) return 1;
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32, half = lane < 16 ? 120 : 376, neighbour = lane ^ 1;
    const int before = lane % 8 ? lane - 1 : lane;
    if (out[i] != 496 + half * 1000 + before + neighbour * neighbour * 7 + 1 + 2) return 1;
  }
  return count != 32;
}

int run_vectors(int bug) {
  const int quads = 37;
  std::vector<float> in(4 * quads), out(4 * quads);
  for (int i = 0; i < 4 * quads; ++i) in[i] = float(i);
  cudaLaunchConfig_t config = {};
  config.gridDim = bug == kTwoBlocks ? 2 : 1;  // which write the same places
  config.blockDim = 40;
  if (cudaLaunchKernelEx(&config, vectors, in.data(), out.data(), quads, bug)) return 1;
  for (int i = 0; i < 4 * quads; ++i)
    if (!(out[i] == in[4 * quads - 1 - i])) return 1;
  config.blockDim = 1025;
  return cudaLaunchKernelEx(&config, vectors, in.data(), out.data(), quads, bug) != cudaErrorInvalidConfiguration ||
         cudaGetLastError() != cudaErrorInvalidConfiguration || cudaGetLastError() != cudaSuccess;
}

int convert(const char* input, const char* output) {
  FILE *const in = std::fopen(input, "rb"), *const out = std::fopen(output, "wb");
  if (!in || !out) return 2;
  std::vector<__half> halves;
  std::vector<__nv_bfloat16> brains;
  for (float value; std::fread(&value, 4, 1, in) == 1;) {
    halves.push_back(__float2half(value));
    brains.push_back(__float2bfloat16(value));
  }
  std::vector<float> all;
  for (int bits = 0; bits < 1 << 16; ++bits) all.push_back(__half2float({static_cast<unsigned short>(bits)}));
  for (int bits = 0; bits < 1 << 16; ++bits) all.push_back(__bfloat162float({static_cast<unsigned short>(bits)}));
  std::fwrite(halves.data(), 2, halves.size(), out);
  std::fwrite(brains.data(), 2, brains.size(), out);
  std::fwrite(all.data(), 4, all.size(), out);
  std::fclose(in);
  return std::fclose(out);
}

}  // namespace
}  // namespace cuda_host_kernels

int main(int argc, char** argv) {
  using namespace cuda_host_kernels;
  const std::string kernel = argc > 1 ? argv[1] : "";
  if (kernel == "convert" && argc == 4) return convert(argv[2], argv[3]);
  const int bug = argc > 2 ? std::atoi(argv[2]) : 0;
  if (kernel == "products") return run_products(bug);
  if (kernel == "lanes") return run_lanes(bug);
  if (kernel == "vectors") return run_vectors(bug);
  return 2;
}
#endif
