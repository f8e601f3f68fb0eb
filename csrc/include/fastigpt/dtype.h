// What numbers are stored as: in arrays that come in, in weights, in activations and in caches. One enum for all of
// csrc, and the names that PyTorch and numpy have for its values.
#pragma once
#include <cstddef>
#include <initializer_list>
#include <string>

namespace fastigpt {

enum class DType { f32, bf16, f16, i8, u8 };

constexpr size_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : dtype == DType::bf16 || dtype == DType::f16 ? 2 : 1;
}
const char* dtype_name(DType dtype);  // "float32", "bfloat16", "float16", "int8", "uint8"

// Both throw std::invalid_argument that names the argument `what`, what was found and what was expected.
DType parse_dtype(const char* what, const std::string& name);
void check_dtype(const char* what, DType dtype, std::initializer_list<DType> allowed);

}  // namespace fastigpt
