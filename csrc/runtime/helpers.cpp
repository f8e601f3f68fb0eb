// Helpers wait for a list of open jobs, take a number of the first one, and run its body.
#include "runtime/helpers.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "fastigpt/threads.h"
#include "runtime/fork.h"

namespace fastigpt {
namespace {

struct Job {
  void (*body)(void*, int);
  void* context;
  int wanted;       // helpers that may still join
  int next = 1;     // number of the next one
  int running = 0;  // helpers inside the body
  std::exception_ptr error{};
  std::condition_variable done{};
};

struct Helpers {
  const uint32_t generation = process_generation();
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<Job*> open;  // jobs that helpers may still join
  int threads = 0;
};

// Never destroyed: its threads run until the process ends.
std::atomic<Helpers*> of_process{nullptr};

Helpers& helpers() {
  Helpers* mine = of_process.load(std::memory_order_acquire);
  if (mine && mine->generation == process_generation()) return *mine;
  BriefLock lock;
  mine = of_process.load(std::memory_order_acquire);
  if (!mine || mine->generation != process_generation()) {
    mine = new Helpers;
    of_process.store(mine, std::memory_order_release);
  }
  return *mine;
}

std::exception_ptr attempt(const Job& job, int thread) {
  try {
    job.body(job.context, thread);
    return nullptr;
  } catch (...) { return std::current_exception(); }
}

void help(Helpers& all) {
  std::unique_lock<std::mutex> lock(all.mutex);
  for (;;) {
    all.wake.wait(lock, [&] { return !all.open.empty(); });
    Job& job = *all.open.front();
    if (--job.wanted == 0) all.open.pop_front();
    const int thread = job.next++;
    ++job.running;
    lock.unlock();
    const std::exception_ptr error = attempt(job, thread);
    lock.lock();
    if (error && !job.error) job.error = error;
    if (--job.running == 0) job.done.notify_one();  // under the mutex: then the job is still there
  }
}

// As many threads as the largest job may use, or as there are to be had.
void grow(Helpers& all, int wanted) {
  try {
    while (all.threads < wanted) {
      std::thread([&all] { help(all); }).detach();
      ++all.threads;
    }
  } catch (const std::exception&) {  // a limit on threads or memory; the next call tries again
  }
}

}  // namespace

int helper_threads() {
  Helpers& all = helpers();
  std::lock_guard<std::mutex> lock(all.mutex);
  return all.threads;
}

void share_erased(int threads, void (*body)(void*, int), void* context) {
  if (threads <= 1) return body(context, 0);
  Helpers& all = helpers();
  Job job{body, context, threads - 1};
  std::unique_lock<std::mutex> lock(all.mutex);
  grow(all, job.wanted);
  all.open.push_back(&job);
  for (int i = 0, n = std::min(job.wanted, all.threads); i < n; ++i) all.wake.notify_one();
  lock.unlock();
  const std::exception_ptr error = attempt(job, 0);
  lock.lock();
  const auto still_open = std::find(all.open.begin(), all.open.end(), &job);
  if (still_open != all.open.end()) all.open.erase(still_open);
  job.done.wait(lock, [&] { return job.running == 0; });
  if (error && !job.error) job.error = error;
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace fastigpt
