// The kernels for AVX-512 F, BW, DQ and VL.
#define FASTIGPT_ISA avx512
#include "operators/kernels_impl.h"
