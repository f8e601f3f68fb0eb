// Blocks, clusters and grids as threads of the process: every CUDA thread is a std::thread.
//
// Two clusters (of one block, where a launch asks for none) run at a time, in a cooperative launch all. Neighbours
// are never on one of the two runners, so that nothing orders them.
#pragma once
#include <algorithm>
#include <atomic>
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

// Calls body once on each thread of the grid.
template <class Body>
void run_grid(const LaunchShape& shape, const Body& body) {
  const unsigned threads = volume(shape.block), clusters = volume(shape.grid) / shape.cluster;
  const unsigned runners = shape.cooperative ? clusters : std::min(clusters, 2u);
  Barrier grid(int(clusters * shape.cluster * threads));
  std::vector<std::thread> running;
  for (unsigned runner = 0; runner < runners; ++runner)
    running.emplace_back([&, runner] {
      for (unsigned c = runner; c < clusters; c += runners) {
        ThreadCluster cluster(shape.cluster, threads, shape.dynamic_bytes);
        std::vector<std::thread> all;
        for (unsigned b = 0; b < shape.cluster; ++b)
          for (unsigned t = 0; t < threads; ++t)
            all.emplace_back([&, b, t] {
              const Position position{cluster.blocks[b].get(), &cluster, shape.cooperative ? &grid : nullptr, b, t};
              run_thread(shape, position, c * shape.cluster + b, body);
            });
        for (std::thread& thread : all) thread.join();
      }
    });
  for (std::thread& thread : running) thread.join();
}

}  // namespace cuda_host
