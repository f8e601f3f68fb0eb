// Shared memory by name and type, for nvcc and for the host compiler that tests build kernels with (csrc/cuda/host):
// __shared__ alone cannot be told apart there, since a block's threads are threads of the process.
//
//   FASTIGPT_SHARED(tile, float[16][65]);         a variable of the block: an array, as the type says
//   FASTIGPT_DYNAMIC_SHARED(row, float);          float* to the bytes that the launch asked for, aligned to 16
#pragma once
#include <type_traits>

namespace fastigpt {

template <class T>
struct SharedType {
  using type = T;
  static_assert(std::is_trivial_v<std::remove_all_extents_t<T>>, "shared memory is not constructed");
};

}  // namespace fastigpt

#ifdef __CUDACC__
#define FASTIGPT_SHARED(name, ...) __shared__ typename ::fastigpt::SharedType<__VA_ARGS__>::type name
#define FASTIGPT_DYNAMIC_SHARED(name, type)                        \
  extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared_)
#else
#include "cuda/host/shared_variables.h"
#define FASTIGPT_SHARED(name, ...) \
  struct name##_site {};           \
  auto& name = *::cuda_host::shared_variable<name##_site, typename ::fastigpt::SharedType<__VA_ARGS__>::type>()
#define FASTIGPT_DYNAMIC_SHARED(name, type) type* const name = ::cuda_host::dynamic_shared<type>()
#endif
