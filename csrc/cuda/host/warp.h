// A warp: 32 threads that exchange values. As in CUDA, only __syncwarp orders memory; shuffles and votes do not.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/host/synchronise.h"

namespace cuda_host {

class Warp {
 public:
  static constexpr int kLanes = 32;

  explicit Warp(int lanes) : gone_(lanes < kLanes ? ~0u << lanes : 0u) {}

  // Waits for all lanes of the mask that have not ended.
  void meet(unsigned mask, int lane) {
    if (!(mask >> lane & 1)) fail("a lane calls a warp function without being in its mask");
    Meeting& meeting = meeting_of(mask);
    unsigned generation;
    {
      Unordered machinery;
      generation = meeting.generation.load();
    }
    meeting.arrived.fetch_or(1u << lane, std::memory_order_release);
    complete(meeting);
    wait_until_not(meeting.generation, generation);
  }

  // The value that lane `from` gave; of a lane that gave none, which CUDA leaves undefined: NaN, −1.
  template <class T>
  T shuffle(unsigned mask, T value, int lane, int from) {
    static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
    Unordered machinery;
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    value_[lane] = bits;
    meet(mask, lane);
    bits = (mask & ~gone_) >> from & 1 ? value_[from].load() : ~uint64_t(0);
    meet(mask, lane);
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  unsigned ballot(unsigned mask, bool vote, int lane) {
    Unordered machinery;
    value_[lane] = vote;
    meet(mask, lane);
    unsigned votes = 0;
    for (int i = 0; i < kLanes; ++i)
      if ((mask & ~gone_) >> i & 1) votes |= unsigned(value_[i]) << i;
    meet(mask, lane);
    return votes;
  }

  void drop(int lane) {
    {
      Unordered machinery;
      gone_.fetch_or(1u << lane);
    }
    for (Meeting& meeting : meetings_) complete(meeting);
  }

 private:
  struct Meeting { std::atomic<unsigned> mask{0}, arrived{0}, generation{0}; };

  Meeting& meeting_of(unsigned mask) {
    Unordered machinery;
    for (Meeting& meeting : meetings_) {
      unsigned found = 0;
      if (meeting.mask.compare_exchange_strong(found, mask) || found == mask) return meeting;
    }
    fail("a warp uses more than 32 masks");
  }

  void complete(Meeting& meeting) {
    unsigned arrived = meeting.arrived.load(std::memory_order_acquire);
    while (arrived && !(meeting.mask & ~(arrived | gone_)))
      if (meeting.arrived.compare_exchange_weak(arrived, 0, std::memory_order_acq_rel)) {
        meeting.generation.fetch_add(1, std::memory_order_release);
        Unordered machinery;
        meeting.generation.notify_all();
        return;
      }
  }

  std::atomic<unsigned> gone_;  // lanes that have ended or never were
  std::atomic<uint64_t> value_[kLanes] = {};
  Meeting meetings_[kLanes];
};

}  // namespace cuda_host
