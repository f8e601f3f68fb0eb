// Asks the processor which instruction sets it runs.
#include "fastigpt/isa.h"

#include <stdexcept>

#if defined(FASTIGPT_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastigpt {
namespace {

constexpr Isa kAll[] = {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512vnni, Isa::amx};

#if defined(FASTIGPT_WITH_AMX)
// Whether there are tiles of bfloat16 and int8, and the kernel lets this process have them, which it has to be asked
// for once; threads and forked children have them then as well.
bool has_tiles() {
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25, kBfloat16 = 1u << 22, kWanted = kTiles | kInt8 | kBfloat16;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kWanted) != kWanted) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Isa detect() {
#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::generic;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
#if defined(FASTIGPT_WITH_AMX)
  if (has_tiles()) return Isa::amx;
#endif
  return Isa::avx512vnni;
#else
  return Isa::generic;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"generic", "avx2", "avx512", "avx512vnni", "amx"};
  return names[static_cast<int>(isa)];
}

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> found;
  for (Isa isa : kAll)
    if (isa <= best_isa()) found.push_back(isa);
  return found;
}

Isa parse_isa(const std::string& name) {
  if (name == "auto") return best_isa();
  for (Isa isa : kAll) {
    if (name != isa_name(isa)) continue;
    if (isa > best_isa())
      throw std::invalid_argument("isa '" + name + "' does not run on this processor (best: " + isa_name(best_isa()) +
                                  ")");
    return isa;
  }
  throw std::invalid_argument("isa must be auto, generic, avx2, avx512, avx512vnni or amx, not '" + name + "'");
}

}  // namespace fastigpt
