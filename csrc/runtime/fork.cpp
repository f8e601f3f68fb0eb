// Handlers that fork() calls.
#include "runtime/fork.h"

#include <atomic>
#include <mutex>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace fastigpt {
namespace {

std::mutex brief;
std::atomic<uint32_t> generation{0};

#ifndef _WIN32
void before() { brief.lock(); }
void in_parent() { brief.unlock(); }
void in_child() {
  generation.fetch_add(1, std::memory_order_release);
  brief.unlock();
}

[[maybe_unused]] const int registered = pthread_atfork(before, in_parent, in_child);
#endif

}  // namespace

uint32_t process_generation() { return generation.load(std::memory_order_acquire); }

BriefLock::BriefLock() { brief.lock(); }
BriefLock::~BriefLock() { brief.unlock(); }

}  // namespace fastigpt
