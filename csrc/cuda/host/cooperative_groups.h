// Groups of threads: the block, the cluster with the shared memory of its blocks, the grid of a cooperative launch.
#pragma once
#include "cuda/host/cuda_runtime.h"

namespace cooperative_groups {

struct thread_block {
  void sync(int line = __builtin_LINE()) const { __syncthreads(line); }
  unsigned thread_rank() const { return cuda_host::here.thread; }
  unsigned num_threads() const { return cuda_host::volume(blockDim); }
};
inline thread_block this_thread_block() { return {}; }

struct cluster_group {
  void sync(int line = __builtin_LINE()) const { cuda_host::here.cluster->barrier.arrive_and_wait(line); }
  // arrive releases, wait acquires; between the two a thread does what needs no one else.
  struct arrival_token { unsigned phase; };
  arrival_token barrier_arrive(int line = __builtin_LINE()) const {
    return {cuda_host::here.cluster->barrier.arrive(line)};
  }
  void barrier_wait(arrival_token&& token) const { cuda_host::here.cluster->barrier.wait(token.phase); }
  unsigned block_rank() const { return cuda_host::here.block_rank; }
  unsigned num_blocks() const { return unsigned(cuda_host::here.cluster->blocks.size()); }
  // The same place in the shared memory of the cluster's block `rank`.
  template <class T>
  T* map_shared_rank(T* address, unsigned rank) const {
    const cuda_host::SharedMemory& own = cuda_host::shared_memory();
    if (own.offset_of(address) >= own.size()) cuda_host::fail("map_shared_rank of memory that is not shared");
    if (rank >= num_blocks()) cuda_host::fail("map_shared_rank of a block that is not in the cluster");
    return reinterpret_cast<T*>(cuda_host::here.cluster->blocks[rank]->shared.at(own.offset_of(address)));
  }
};
inline cluster_group this_cluster() { return {}; }

struct grid_group {
  void sync(int line = __builtin_LINE()) const {
    if (!cuda_host::here.grid) cuda_host::fail("grid.sync() in a launch that is not cooperative");
    cuda_host::here.grid->arrive_and_wait(line);
  }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
