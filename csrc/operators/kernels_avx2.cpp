// The kernels for AVX2 and FMA.
#define FASTIGPT_ISA avx2
#include "operators/kernels_impl.h"
