// The engine's threads, for steps of microseconds: all run the same body and meet at barriers inside it. Who waits
// spins for a while, because the next step is usually near, and then sleeps, because it may not be.
//
// Why operators have others (helpers.h): a pass of the bundled model takes 36 us on two threads and meets 27 times, all
// in 8 us (benchmarks/results/windows.md), where waking a sleeping thread takes some 20 us each time. Operators meet
// once a call, are called between other libraries' work, which threads that spin would slow down, and several at a
// time.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <type_traits>

namespace fastigpt {

// A counter that threads wait on.
class Gate {
 public:
  uint32_t now() const { return value_.load(std::memory_order_acquire); }
  void open();               // next value; wakes whoever sleeps
  void pass(uint32_t seen);  // returns once the value is no longer `seen`; spins for about a millisecond, then sleeps

 private:
  alignas(64) std::atomic<uint32_t> value_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class SpinningPool {
 public:
  // threads: at least 1; the caller of run() is one of them. There are fewer where the system refuses to start them.
  explicit SpinningPool(int threads);
  ~SpinningPool();
  SpinningPool(const SpinningPool&) = delete;
  SpinningPool& operator=(const SpinningPool&) = delete;

  // Threads that a job runs on. Constant inside a job; between two it may fall (a forked child was given fewer), never
  // rise.
  int size() const { return size_.load(std::memory_order_relaxed); }
  // Calls body(thread) on every thread, 0 being the caller, and returns when all are done. `body` must not throw.
  // Callers take turns: whoever comes second waits. In a forked child the pool starts threads of its own.
  template <class Body>
  void run(Body&& body) {
    run_erased([](void* context, int thread) { (*static_cast<std::remove_reference_t<Body>*>(context))(thread); },
               &body);
  }
  void barrier();  // inside a body: returns once every thread has come here

 private:
  struct Crew;  // the threads of one process and what they wait on

  void run_erased(void (*body)(void*, int), void* context);
  Crew& crew();
  void start(Crew& crew);
  void work(Crew& crew, int thread);
  void meet(Crew& crew);

  std::atomic<int> size_;
  std::atomic<Crew*> crew_;
};

}  // namespace fastigpt
