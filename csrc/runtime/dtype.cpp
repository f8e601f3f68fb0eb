// Dtypes by name.
#include "fastigpt/dtype.h"

#include <algorithm>
#include <stdexcept>

namespace fastigpt {
namespace {

constexpr DType kAll[] = {DType::f32, DType::bf16, DType::f16, DType::i8, DType::u8};

// "a, b or c"
template <class List>
std::string names_of(const List& dtypes) {
  std::string names;
  size_t left = std::size(dtypes);
  for (DType dtype : dtypes) {
    names += dtype_name(dtype);
    if (--left) names += left > 1 ? ", " : " or ";
  }
  return names;
}

}  // namespace

const char* dtype_name(DType dtype) {
  constexpr const char* names[] = {"float32", "bfloat16", "float16", "int8", "uint8"};
  return names[static_cast<int>(dtype)];
}

DType parse_dtype(const char* what, const std::string& name) {
  for (DType dtype : kAll)
    if (name == dtype_name(dtype)) return dtype;
  throw std::invalid_argument(std::string(what) + " must be " + names_of(kAll) + ", not '" + name + "'");
}

void check_dtype(const char* what, DType dtype, std::initializer_list<DType> allowed) {
  if (std::find(allowed.begin(), allowed.end(), dtype) == allowed.end())
    throw std::invalid_argument(std::string(what) + " must be " + names_of(allowed) + ", not " + dtype_name(dtype));
}

}  // namespace fastigpt
