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
[[maybe_unused]] const int registered = pthread_atfork([] { brief.lock(); }, [] { brief.unlock(); },
                                      [] {
                                        generation.fetch_add(1, std::memory_order_release);
                                        brief.unlock();
                                      });
#endif

}  // namespace

uint32_t process_generation() { return generation.load(std::memory_order_acquire); }

BriefLock::BriefLock() { brief.lock(); }
BriefLock::~BriefLock() { brief.unlock(); }

}  // namespace fastigpt
