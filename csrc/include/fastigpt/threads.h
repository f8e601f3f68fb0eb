// A pool of threads for steps of microseconds: all threads run the same body and meet at barriers inside it. Waiting
// threads spin for a while, because the next phase is usually near, and then sleep, because it may not be.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace fastigpt {

// A counter that threads wait on.
class Gate {
 public:
  uint32_t now() const { return value_.load(std::memory_order_acquire); }
  void open();               // next value; wakes whoever sleeps
  void pass(uint32_t seen, int spins);  // returns once the value is no longer `seen`; sleeps after that many looks

 private:
  alignas(64) std::atomic<uint32_t> value_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class ThreadPool {
 public:
  static constexpr int kSpins = 20000;  // about a millisecond
  // threads: at least 1; the caller of run() is one of them. spins: looks at a gate before a worker sleeps; few where other
  // libraries' threads need the cores between two jobs.
  explicit ThreadPool(int threads, int spins = kSpins);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }
  // Calls body(thread) on every thread, 0 being the caller, and returns when all are done. `body` must not throw. Callers
  // take turns: whoever comes second waits.
  template <class Body>
  void run(Body&& body) {
    run_erased([](void* context, int thread) { (*static_cast<std::remove_reference_t<Body>*>(context))(thread); }, &body);
  }
  void barrier();  // inside a body: returns once every thread has come here

 private:
  void run_erased(void (*body)(void*, int), void* context);
  void start();
  void work(int thread);

  const int size_, spins_;
  std::mutex turn_;
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  bool stop_ = false;
  long owner_ = 0;  // process that started the workers: after fork() they must be started anew
  Gate job_, barrier_;
  alignas(64) std::atomic<int> arrived_{0};
  std::vector<std::thread> workers_;
};

}  // namespace fastigpt
