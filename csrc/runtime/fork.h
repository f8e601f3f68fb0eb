// What a process must know to survive fork(): that it is a child, whose parent's threads are not in it, and a lock that
// is never found held.
//
// A child has the memory of its parent and one thread. Mutexes that other threads held stay held, condition variables
// wait for sleepers that are gone (destroying one hangs), and what those threads were changing is half changed. So
// whatever belongs to threads is marked with the generation that made it, and a child makes its own and leaves the old
// alone: it is not destroyed, only forgotten.
#pragma once
#include <cstdint>

namespace fastigpt {

// Rises with every fork() on the way from the process that loaded this library to this one.
uint32_t process_generation();

// The process' one lock for changes that take moments: fork() waits for it, so in a child it is free, and what it
// guards is whole. Whoever holds it must call nothing that forks or takes it again.
class BriefLock {
 public:
  BriefLock();
  ~BriefLock();
  BriefLock(const BriefLock&) = delete;
  BriefLock& operator=(const BriefLock&) = delete;
};

}  // namespace fastigpt
