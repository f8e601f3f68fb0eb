// Dtypes by name.
#include "operators/row_types.h"

#include <stdexcept>

namespace fastigpt {

Number number_of(const std::string& dtype) {
  if (dtype == "float32") return Number::f32;
  if (dtype == "bfloat16") return Number::bf16;
  if (dtype == "int8") return Number::i8;
  throw std::invalid_argument("dtype " + dtype);
}

}  // namespace fastigpt
