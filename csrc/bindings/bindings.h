// What module.cpp gathers: one function for each part of the extension.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "fastigpt/decode.h"

namespace fastigpt {

void bind_engine(pybind11::module_& m);
void bind_operators(pybind11::module_& m);
void bind_nearest_centroid(pybind11::module_& m);
void bind_vq_networks(pybind11::module_& m);

// Throws std::invalid_argument for what is no setting of a draw. top_k 0: all.
DrawSettings draw_settings(uint64_t seed, double temperature, int top_k, double top_p,
                           std::optional<double> guidance_scale);

}  // namespace fastigpt
