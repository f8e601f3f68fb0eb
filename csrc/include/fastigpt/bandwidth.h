// Read bandwidth of the machine.
#pragma once
#include <cstddef>
#include <vector>

namespace fastigpt {

// Bytes read per second by at most `threads` threads that sum `bytes` of memory between them, once for each repeat.
std::vector<double> read_bandwidth(std::size_t bytes, int threads, int repeats);

}  // namespace fastigpt
