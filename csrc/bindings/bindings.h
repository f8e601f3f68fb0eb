// What module.cpp gathers: one function for each part of the extension.
#pragma once
#include <pybind11/pybind11.h>

namespace fastigpt {

void bind_cpu_engine(pybind11::module_& m);
void bind_operators(pybind11::module_& m);
void bind_quantize(pybind11::module_& m);

}  // namespace fastigpt
