// The kernels for AVX-512 with VNNI and BF16, and linear layers on the matrix unit.
#if defined(FASTIGPT_WITH_AMX)
#define FASTIGPT_ISA amx
#define FASTIGPT_TILES
#include "operators/kernels_impl.h"
#endif
