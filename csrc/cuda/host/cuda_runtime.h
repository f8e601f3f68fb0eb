// What kernels and their launchers ask of CUDA, for a C++20 host compiler: a test builds csrc/cuda/*.cu with this
// folder before all others on the include path, under ThreadSanitizer or AddressSanitizer and UBSan. README.md, beside
// this, says what that shows and what it cannot.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "cuda/host/constants.h"
#include "cuda/host/thread_block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

// --- launches: a kernel has ended when its launch returns, which is an order that every stream has

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline thread_local cudaError_t last_error_ = cudaSuccess;
inline cudaError_t cudaGetLastError() { return std::exchange(last_error_, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2, cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  int cooperative;
  struct { unsigned x, y, z; } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  cuda_host::LaunchShape shape{config->gridDim, config->blockDim, config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) shape.cooperative = attribute.val.cooperative;
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& cluster = attribute.val.clusterDim;
      if (cluster.y != 1 || cluster.z != 1) cuda_host::fail("only clusters along x are known here");
      shape.cluster = cluster.x;
    }
  }
  const unsigned threads = cuda_host::volume(shape.block);
  if (cuda_host::volume(shape.grid) == 0 || threads == 0 || threads > 1024 || shape.dynamic_bytes > 227 * 1024 ||
      shape.cluster == 0 || shape.cluster > 16 || shape.grid.x % shape.cluster)
    return last_error_ = cudaErrorInvalidConfiguration;
  cuda_host::run_grid(shape, [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}

// --- threads of a block and lanes of a warp

inline void __syncthreads(int line = __builtin_LINE()) { cuda_host::here.block->barrier.arrive_and_wait(line); }

constexpr int warpSize = cuda_host::Warp::kLanes;

inline void __syncwarp(unsigned mask = ~0u) { cuda_host::here.warp().meet(mask, cuda_host::here.lane()); }
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = warpSize) {
  const int lane = cuda_host::here.lane();
  return cuda_host::here.warp().shuffle(mask, value, lane, (lane & -width) + (from & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = cuda_host::here.lane(), from = lane - int(delta);
  return cuda_host::here.warp().shuffle(mask, value, lane, from < (lane & -width) ? lane : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = cuda_host::here.lane(), from = lane + int(delta);
  return cuda_host::here.warp().shuffle(mask, value, lane, from >= (lane & -width) + width ? lane : from);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize) {
  const int lane = cuda_host::here.lane(), from = lane ^ bits;
  return cuda_host::here.warp().shuffle(mask, value, lane, from >= (lane & -width) + width ? lane : from);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  return cuda_host::here.warp().ballot(mask, vote, cuda_host::here.lane());
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, !vote) == 0; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

// --- memory

template <class T>
T __ldg(const T* address) {
  for (const auto& [first, bytes] : cuda_host::constants)
    if (size_t(reinterpret_cast<const char*>(address) - first) < bytes) return *address;
  cuda_host::fail("__ldg of memory that is not constant");
}

// CUDA's plain atomics are relaxed: they order nothing else.
template <class T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
T atomicExch(T* address, T value) {
  return std::atomic_ref<T>(*address).exchange(value, std::memory_order_relaxed);
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}
template <class T>
T atomicMin(T* address, T value) {
  T old = std::atomic_ref<T>(*address).load(std::memory_order_relaxed);
  while (value < old && !std::atomic_ref<T>(*address).compare_exchange_weak(old, value, std::memory_order_relaxed)) {}
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  T old = std::atomic_ref<T>(*address).load(std::memory_order_relaxed);
  while (value > old && !std::atomic_ref<T>(*address).compare_exchange_weak(old, value, std::memory_order_relaxed)) {}
  return old;
}
inline void __nanosleep(unsigned) { std::this_thread::yield(); }

// --- arithmetic

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
inline int __float_as_int(float value) { return __builtin_bit_cast(int, value); }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
