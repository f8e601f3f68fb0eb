// The thread pool: gates that spin, then yield, then sleep.
#include "fastigpt/threads.h"

#ifdef _WIN32
#include <process.h>
#else
#include <unistd.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fastigpt {
namespace {

constexpr int kYieldEvery = 256;

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  asm volatile("yield");
#endif
}

long process_id() {
#ifdef _WIN32
  return _getpid();
#else
  return getpid();
#endif
}

}  // namespace

void Gate::open() {
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
  { std::lock_guard<std::mutex> lock(mutex_); }  // a sleeper between its last look and its wait holds the mutex
  wake_.notify_all();
}

void Gate::pass(uint32_t seen, int spins) {
  for (int spin = 1; spin <= spins; ++spin) {
    if (now() != seen) return;
    if (spin % kYieldEvery == 0)
      std::this_thread::yield();
    else
      relax();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  wake_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != seen; });
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

ThreadPool::ThreadPool(int threads, int spins) : size_(threads < 1 ? 1 : threads), spins_(spins) { start(); }

ThreadPool::~ThreadPool() {
  if (owner_ != process_id()) {  // a forked child: the threads are not here
    for (auto& worker : workers_) worker.detach();
    return;
  }
  stop_ = true;
  job_.open();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::start() {
  owner_ = process_id();
  for (int thread = 1; thread < size_; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

void ThreadPool::work(int thread) {
  // The first job may have been posted before this thread began, so it counts jobs rather than looking at the gate.
  for (uint32_t seen = 0;; ++seen) {
    job_.pass(seen, spins_);
    if (stop_) return;
    body_(context_, thread);
    barrier();
  }
}

void ThreadPool::barrier() {
  if (size_ == 1) return;
  const uint32_t seen = barrier_.now();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    barrier_.open();
  } else {
    barrier_.pass(seen, kSpins);
  }
}

void ThreadPool::run_erased(void (*body)(void*, int), void* context) {
  std::lock_guard<std::mutex> turn(turn_);
  if (owner_ != process_id()) {
    for (auto& worker : workers_) worker.detach();
    workers_.clear();
    // Workers count jobs from 0: start them in a pool whose gate is made anew.
    job_.~Gate();
    new (&job_) Gate;
    barrier_.~Gate();
    new (&barrier_) Gate;
    arrived_.store(0);
    start();
  }
  body_ = body;
  context_ = context;
  if (size_ > 1) job_.open();
  body(context, 0);
  barrier();
}

}  // namespace fastigpt
