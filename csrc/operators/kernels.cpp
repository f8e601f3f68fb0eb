// Picks the kernels of an instruction set.
#include "operators/kernels.h"

namespace fastigpt {

namespace generic { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512vnni { extern const Kernels kernels; }
#endif
#if defined(FASTIGPT_WITH_AMX)
namespace amx { extern const Kernels kernels; }
#endif

const Kernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx2) return avx2::kernels;
  if (isa == Isa::avx512) return avx512::kernels;
  if (isa == Isa::avx512vnni) return avx512vnni::kernels;
#endif
#if defined(FASTIGPT_WITH_AMX)
  if (isa == Isa::amx) return amx::kernels;
#endif
  return generic::kernels;
}

}  // namespace fastigpt
