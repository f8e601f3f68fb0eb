// Blocks, clusters and grids as threads of the process: every CUDA thread is a std::thread.
//
// Two clusters (of one block, where a launch asks for none) run at a time, in a cooperative launch all. A cluster's
// threads are joined only when the next one's exist: so nothing orders neighbours, and none of their threads gets the
// number of one that has ended, which ThreadSanitizer would take for the same thread, however slowly the next starts.
#pragma once
#include <algorithm>
#include <atomic>
#include <list>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/host/shared_variables.h"
#include "cuda/host/synchronise.h"
#include "cuda/host/vector_types.h"
#include "cuda/host/warp.h"

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

namespace cuda_host {

inline unsigned volume(dim3 d) { return d.x * d.y * d.z; }
// Place of `at` in a box of `size`, x first, and back.
inline unsigned rank_in(dim3 size, uint3 at) { return (at.z * size.y + at.y) * size.x + at.x; }
inline uint3 place_in(dim3 size, unsigned rank) {
  return {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
}

struct ThreadBlock {
  ThreadBlock(unsigned threads, size_t dynamic_bytes)
      : begun(int(threads)), barrier(int(threads)), running(int(threads)), shared(dynamic_bytes) {
    for (unsigned first = 0; first < threads; first += Warp::kLanes)
      warps.push_back(std::make_unique<Warp>(int(std::min<unsigned>(Warp::kLanes, threads - first))));
  }
  Barrier begun, barrier;
  std::atomic<int> running;
  SharedMemory shared;
  std::vector<std::unique_ptr<Warp>> warps;
};

struct ThreadCluster {
  ThreadCluster(unsigned size, unsigned threads, size_t dynamic_bytes) : barrier(int(size * threads)) {
    for (unsigned i = 0; i < size; ++i) blocks.push_back(std::make_unique<ThreadBlock>(threads, dynamic_bytes));
  }
  Barrier barrier;
  std::vector<std::unique_ptr<ThreadBlock>> blocks;
};

struct LaunchShape {
  dim3 grid, block;
  size_t dynamic_bytes = 0;
  unsigned cluster = 1;  // blocks, along x
  bool cooperative = false;
};

// Where the calling thread is.
struct Position {
  ThreadBlock* block = nullptr;
  ThreadCluster* cluster = nullptr;
  Barrier* grid = nullptr;  // of a cooperative launch
  unsigned block_rank = 0;  // in the cluster
  unsigned thread = 0;      // in the block
  unsigned cluster_phase = 0;

  int lane() const { return int(thread % Warp::kLanes); }
  Warp& warp() const { return *block->warps[thread / Warp::kLanes]; }
};
inline thread_local Position here;

inline SharedMemory& shared_memory() { return here.block->shared; }

inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA on the host: block (%u %u %u) thread (%u %u %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z, what);
  std::fflush(nullptr);
  std::_Exit(kFailed);
}

template <class Body>
void run_thread(const LaunchShape& shape, const Position& position, unsigned block, const Body& body) {
  here = position;
  threadIdx = place_in(shape.block, here.thread);
  blockIdx = place_in(shape.grid, block);
  blockDim = shape.block;
  gridDim = shape.grid;
  if (here.thread == 0) here.block->shared.begin();
  here.block->begun.arrive_and_wait(__LINE__);
  body();
  here.block->barrier.drop();
  here.warp().drop(here.lane());
  here.cluster->barrier.drop();
  if (here.grid) here.grid->drop();
  if (here.block->running.fetch_sub(1) == 1) here.block->shared.end();
}

// The threads of one cluster, from their creation until they are joined.
class RunningCluster {
 public:
  template <class Body>
  RunningCluster(const LaunchShape& shape, unsigned number, Barrier* grid, const Body& body)
      : cluster_(shape.cluster, volume(shape.block), shape.dynamic_bytes) {
    for (unsigned b = 0; b < shape.cluster; ++b)
      for (unsigned t = 0; t < volume(shape.block); ++t)
        threads_.emplace_back([=, this, &shape, &body] {
          run_thread(shape, {cluster_.blocks[b].get(), &cluster_, grid, b, t}, number * shape.cluster + b, body);
        });
  }
  ~RunningCluster() {
    for (std::thread& thread : threads_) thread.join();
  }
  RunningCluster(const RunningCluster&) = delete;

 private:
  ThreadCluster cluster_;
  std::vector<std::thread> threads_;
};

// Calls body once on each thread of the grid.
template <class Body>
void run_grid(const LaunchShape& shape, const Body& body) {
  const unsigned clusters = volume(shape.grid) / shape.cluster, at_once = shape.cooperative ? clusters : 2;
  Barrier grid(int(clusters * shape.cluster * volume(shape.block)));
  std::list<RunningCluster> running;
  for (unsigned c = 0; c < clusters; ++c) {
    if (running.size() == at_once) running.pop_front();
    running.emplace_back(shape, c, shape.cooperative ? &grid : nullptr, body);
  }
}

}  // namespace cuda_host
