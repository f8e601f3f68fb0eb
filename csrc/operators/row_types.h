// What the operators on plain rows share: the names of dtypes.
#pragma once
#include <string>

#include "fastigpt/rows.h"
#include "operators/kernels.h"

namespace fastigpt {

Number number_of(const std::string& dtype);  // throws std::invalid_argument
inline size_t bytes_of(Number number) { return number == Number::f32 ? 4 : number == Number::bf16 ? 2 : 1; }

}  // namespace fastigpt
