// Python face of the operators for other people's caches. Tensors arrive as addresses: fastigpt/ops has checked
// them.
#include "fastigpt/rows.h"

#include <pybind11/stl.h>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace fastigpt {
namespace {

using Addresses = std::array<uintptr_t, 4>;  // k, v, k_scale, v_scale

StoredRows stored_rows(const Addresses& a, int64_t rows, int64_t slots) {
  return {reinterpret_cast<void*>(a[0]),
          reinterpret_cast<void*>(a[1]),
          reinterpret_cast<float*>(a[2]),
          reinterpret_cast<float*>(a[3]),
          rows,
          slots};
}

}  // namespace

void bind_operators(py::module_& m) {
  m.def(
      "decode_rows",
      [](const std::string& dtype, const std::string& stored, std::array<int64_t, 4> shape,
         std::array<uintptr_t, 3> qkv, std::array<int64_t, 3> strides, const Addresses& cache, int64_t capacity,
         uintptr_t positions, const Addresses& prefix, int64_t sources, int64_t prefix_slots, uintptr_t prefix_lengths,
         uintptr_t out, const std::string& isa, int threads) {
        const auto pointer = [](uintptr_t a) { return reinterpret_cast<const void*>(a); };
        const DecodeRows job{parse_dtype("q", dtype),
                             parse_dtype("the cache", stored),
                             pointer(qkv[0]),
                             pointer(qkv[1]),
                             pointer(qkv[2]),
                             strides[0],
                             strides[1],
                             strides[2],
                             shape[0],
                             shape[1],
                             shape[2],
                             shape[3],
                             stored_rows(cache, shape[0], capacity),
                             reinterpret_cast<const int32_t*>(positions),
                             stored_rows(prefix, sources, prefix_slots),
                             reinterpret_cast<const int32_t*>(prefix_lengths),
                             reinterpret_cast<void*>(out)};
        const Isa chosen = parse_isa(isa);
        py::gil_scoped_release release;
        decode_rows(job, chosen, threads);
      },
      "Addresses in, results in place; see csrc/include/fastigpt/rows.h.");
  m.def(
      "sample_rows",
      [](const std::string& hidden_dtype, const std::string& weight_dtype, std::array<int64_t, 3> shape,
         uintptr_t hidden, uintptr_t without, uintptr_t gain, uintptr_t weight, uintptr_t index, uintptr_t position,
         float epsilon, uint64_t seed, double temperature, int top_k, double top_p,
         std::optional<double> guidance_scale, uintptr_t tokens, const std::string& isa, int threads) {
        const SampleRows job{parse_dtype("hidden", hidden_dtype),
                             parse_dtype("weight", weight_dtype),
                             reinterpret_cast<const void*>(hidden),
                             reinterpret_cast<const void*>(without),
                             reinterpret_cast<const float*>(gain),
                             reinterpret_cast<const void*>(weight),
                             reinterpret_cast<const int64_t*>(index),
                             reinterpret_cast<const int64_t*>(position),
                             shape[0],
                             shape[1],
                             shape[2],
                             epsilon,
                             draw_settings(seed, temperature, top_k, top_p, guidance_scale),
                             reinterpret_cast<int64_t*>(tokens)};
        const Isa chosen = parse_isa(isa);
        py::gil_scoped_release release;
        sample_rows(job, chosen, threads);
      },
      "Addresses in, tokens out; see csrc/include/fastigpt/rows.h.");
}

}  // namespace fastigpt
