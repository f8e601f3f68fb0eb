// What a kernels_*.cpp file is made of: the kernels, compiled with that file's instructions, and their table.
#pragma once
#include "operators/attention_impl.h"
#include "operators/draw_impl.h"
#include "operators/kernels.h"
#include "operators/linear_impl.h"
#include "operators/picture_impl.h"
#include "operators/row_attention_impl.h"

namespace fastigpt {
namespace FASTIGPT_ISA {

extern const Kernels kernels;
const Kernels kernels = {Isa::FASTIGPT_ISA,
                         activation_bytes,
                         norm,
                         norm_floats,
                         quantize_rows,
                         linear,
                         activate,
                         softmax,
                         rotate,
                         put_key,
                         put_value,
                         attend,
                         attend_scratch,
                         put_row,
                         attend_rows,
                         attend_rows_scratch,
                         product_rows,
                         draw,
                         gumbel};

}  // namespace FASTIGPT_ISA
}  // namespace fastigpt
