// The thread pool: gates that spin, then yield, then sleep.
#include "runtime/spinning_pool.h"

#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "runtime/fork.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fastigpt {
namespace {

constexpr int kSpins = 20000;  // about a millisecond
constexpr int kYieldEvery = 256;

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  asm volatile("yield");
#endif
}

}  // namespace

void Gate::open() {
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
  { std::lock_guard<std::mutex> lock(mutex_); }  // a sleeper between its last look and its wait holds the mutex
  wake_.notify_all();
}

void Gate::pass(uint32_t seen) {
  for (int spin = 1; spin <= kSpins; ++spin) {
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

struct SpinningPool::Crew {
  const uint32_t generation = process_generation();
  std::mutex turn;
  bool started = false;
  bool stop = false;
  void (*body)(void*, int) = nullptr;
  void* context = nullptr;
  Gate job, barrier;
  alignas(64) std::atomic<int> arrived{0};
  std::vector<std::thread> workers;
};

SpinningPool::SpinningPool(int threads) : size_(threads < 1 ? 1 : threads) {
  auto first = std::make_unique<Crew>();
  start(*first);
  crew_ = first.release();
}

SpinningPool::~SpinningPool() {
  Crew* mine = crew_.load();
  if (mine->generation != process_generation()) return;  // a forked child: nobody is here to be stopped, see fork.h
  mine->stop = true;
  mine->job.open();
  for (auto& worker : mine->workers) worker.join();
  delete mine;
}

// The crew of this process, without its threads at first in a forked child.
SpinningPool::Crew& SpinningPool::crew() {
  Crew* mine = crew_.load(std::memory_order_acquire);
  if (mine->generation == process_generation()) return *mine;
  BriefLock lock;
  mine = crew_.load(std::memory_order_acquire);
  if (mine->generation != process_generation()) {
    mine = new Crew;
    crew_.store(mine, std::memory_order_release);
  }
  return *mine;
}

void SpinningPool::start(Crew& crew) {
  crew.workers.reserve(size_t(size()));
  try {
    for (int thread = 1; thread < size(); ++thread)
      crew.workers.emplace_back([this, &crew, thread] { work(crew, thread); });
  } catch (const std::exception&) {  // a limit on threads or memory: those that run will do
  }
  size_.store(int(crew.workers.size()) + 1, std::memory_order_relaxed);
  crew.started = true;
}

void SpinningPool::work(Crew& crew, int thread) {
  // The first job may have been posted before this thread began, so it counts jobs rather than looking at the gate.
  for (uint32_t seen = 0;; ++seen) {
    crew.job.pass(seen);
    if (crew.stop) return;
    crew.body(crew.context, thread);
    meet(crew);
  }
}

void SpinningPool::barrier() { meet(*crew_.load(std::memory_order_relaxed)); }

void SpinningPool::meet(Crew& crew) {
  const int threads = size();
  if (threads == 1) return;
  const uint32_t seen = crew.barrier.now();
  if (crew.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
    crew.arrived.store(0, std::memory_order_relaxed);
    crew.barrier.open();
  } else {
    crew.barrier.pass(seen);
  }
}

void SpinningPool::run_erased(void (*body)(void*, int), void* context) {
  Crew& mine = crew();
  std::lock_guard<std::mutex> turn(mine.turn);
  if (!mine.started) start(mine);
  mine.body = body;
  mine.context = context;
  if (size() > 1) mine.job.open();
  body(context, 0);
  meet(mine);
}

}  // namespace fastigpt
