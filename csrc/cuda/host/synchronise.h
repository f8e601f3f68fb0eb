// How threads that play CUDA threads wait for one another, so that ThreadSanitizer sees the order that CUDA promises
// and no other: what a barrier orders is ordered, and what happens inside the machinery is not seen at all.
// (std::barrier and std::atomic::wait share libstdc++'s table of waiters, which would order threads of unrelated
// blocks and hide their races.)
#pragma once
#include <atomic>
#include <cstdio>
#include <cstdlib>

#ifdef __SANITIZE_THREAD__
extern "C" void AnnotateIgnoreSyncBegin(const char* file, int line);
extern "C" void AnnotateIgnoreSyncEnd(const char* file, int line);
#endif

namespace cuda_host {

constexpr int kFailed = 70;  // exit status

// A kernel did what CUDA leaves undefined.
[[noreturn]] void fail(const char* what);

// While one of these lives, nothing this thread does orders it after or before others.
struct Unordered {
#ifdef __SANITIZE_THREAD__
  Unordered() { AnnotateIgnoreSyncBegin(__FILE__, __LINE__); }
  ~Unordered() { AnnotateIgnoreSyncEnd(__FILE__, __LINE__); }
#else
  Unordered() {}
#endif
  Unordered(const Unordered&) = delete;
};

// Sleeps until `value` is no longer `old`, then acquires it.
inline void wait_until_not(const std::atomic<unsigned>& value, unsigned old) {
  {
    Unordered machinery;
    value.wait(old);
  }
  value.load(std::memory_order_acquire);
}

// A barrier for as many threads as have not dropped out. A thread that arrives releases what it wrote, and one that
// has waited acquires what all wrote before they arrived.
class Barrier {
 public:
  explicit Barrier(int threads) : members_(threads), missing_(threads) {}

  // line: where in the source; all have to arrive at the same one.
  unsigned arrive(int line) {
    unsigned phase;
    {
      Unordered machinery;
      phase = phase_.load();
      int first = 0;
      if (!line_.compare_exchange_strong(first, line) && first != line) {
        std::fprintf(stderr, "lines %d and %d\n", first, line);
        fail("threads meet at different barriers");
      }
    }
    if (missing_.fetch_sub(1, std::memory_order_release) == 1) complete();
    return phase;
  }
  void wait(unsigned phase) { wait_until_not(phase_, phase); }
  void arrive_and_wait(int line) { wait(arrive(line)); }

  // This thread has ended: the others no longer wait for it.
  void drop() {
    int missing;
    {
      Unordered machinery;
      --members_;
      missing = missing_.fetch_sub(1);
    }
    if (missing == 1) complete();
  }

 private:
  void complete() {
    missing_.load(std::memory_order_acquire);
    missing_ = members_.load();
    line_ = 0;
    phase_.fetch_add(1, std::memory_order_release);
    Unordered machinery;
    phase_.notify_all();
  }

  std::atomic<int> members_, missing_, line_{0};
  std::atomic<unsigned> phase_{0};
};

}  // namespace cuda_host
