// How many threads may be asked for, and how many there are.
#pragma once

namespace fastigpt {

constexpr int kMaxThreads = 1024;  // of one call or one model
int helper_threads();              // that the operators of this process share, by now

}  // namespace fastigpt
