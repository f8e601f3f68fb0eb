// Instruction sets that kernels are compiled for, and which of them this processor runs.
#pragma once
#include <string>
#include <vector>

namespace fastigpt {

// In rising order: a processor that runs one runs all before it. avx512vnni stands for AVX512-VNNI together with
// AVX512-BF16 (Zen 4, Cooper Lake, Sapphire Rapids and later), amx for that and AMX's tiles of bfloat16 and int8
// (Sapphire Rapids and later, on Linux).
enum class Isa { generic = 0, avx2 = 1, avx512 = 2, avx512vnni = 3, amx = 4 };

const char* isa_name(Isa isa);
Isa best_isa();                     // asked of the processor once
std::vector<Isa> supported_isas();  // generic first, best last
// "auto" gives best_isa(). Throws std::invalid_argument for an unknown name or one that this processor cannot run.
Isa parse_isa(const std::string& name);

}  // namespace fastigpt
