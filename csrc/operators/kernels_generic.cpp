// The kernels for SSE2, NEON, or whatever the compiler's baseline is.
#define FASTIGPT_ISA generic
#include "operators/kernels_impl.h"
