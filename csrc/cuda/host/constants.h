// Memory that a launch only reads: what __ldg, which does not see what the launch itself writes, may be asked for.
#pragma once
#include <cstddef>
#include <utility>
#include <vector>

namespace cuda_host {

inline std::vector<std::pair<const char*, size_t>> constants;  // address, bytes

}  // namespace cuda_host
