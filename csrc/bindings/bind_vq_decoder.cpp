// Python face of the decoder of a VQ. Tensors arrive as addresses: fastigpt/codecs/vq_decoder.py has checked them.
#include "fastigpt/vq_decoder.h"

#include <pybind11/stl.h>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace fastigpt {

void bind_vq_decoder(py::module_& m) {
  py::class_<VqDecoder>(m, "VqDecoder", "See csrc/include/fastigpt/vq_decoder.h.")
      .def(py::init([](const std::string& dtype, const std::string& isa) {
        return std::make_unique<VqDecoder>(parse_dtype("dtype", dtype), parse_isa(isa));
      }))
      .def(
          "load",
          [](VqDecoder& self, const std::string& name, uintptr_t address, const std::string& dtype,
             const std::vector<int64_t>& shape, int threads) {
            const DType stored = parse_dtype(name.c_str(), dtype);
            py::gil_scoped_release release;
            self.load(name, reinterpret_cast<const void*>(address), stored, shape, threads);
          },
          "A tensor by its name; it is copied.")
      .def(
          "decode",
          [](const VqDecoder& self, uintptr_t entries, int height, int width, int dim, uintptr_t pixels, int threads) {
            py::gil_scoped_release release;
            self.decode(reinterpret_cast<const float*>(entries), height, width, dim, reinterpret_cast<float*>(pixels),
                        threads);
          },
          "entries float32 [height * width, dim] to pixels float32 [height * patch, width * patch, 3].");
}

}  // namespace fastigpt
