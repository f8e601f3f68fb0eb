// The kernels for AVX-512 with VNNI and BF16 dot products.
#define FASTIGPT_ISA avx512vnni
#include "operators/kernels_impl.h"
