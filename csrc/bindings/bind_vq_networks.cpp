// Python face of a VQ's networks. Tensors arrive as addresses: fastigpt/codecs/vq_cpu.py has checked them.
#include "fastigpt/vq_networks.h"

#include <pybind11/stl.h>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace fastigpt {

void bind_vq_networks(py::module_& m) {
  py::class_<VqNetworks>(m, "VqNetworks", "See csrc/include/fastigpt/vq_networks.h.")
      .def(py::init([](const std::string& dtype, const std::string& isa) {
        return std::make_unique<VqNetworks>(parse_dtype("dtype", dtype), parse_isa(isa));
      }))
      .def(
          "load",
          [](VqNetworks& self, const std::string& name, uintptr_t address, const std::string& dtype,
             const std::vector<int64_t>& shape, int threads) {
            const DType stored = parse_dtype(name.c_str(), dtype);
            py::gil_scoped_release release;
            self.load(name, reinterpret_cast<const void*>(address), stored, shape, threads);
          },
          "A tensor by its name; it is copied.")
      .def(
          "decode",
          [](const VqNetworks& self, uintptr_t entries, int height, int width, int dim, uintptr_t pixels, int threads) {
            py::gil_scoped_release release;
            self.decode(reinterpret_cast<const float*>(entries), height, width, dim, reinterpret_cast<float*>(pixels),
                        threads);
          },
          "entries float32 [height * width, dim] to pixels float32 [height * patch, width * patch, 3].")
      .def(
          "encode",
          [](const VqNetworks& self, uintptr_t pixels, int height, int width, int dim, uintptr_t latents, int threads) {
            py::gil_scoped_release release;
            self.encode(reinterpret_cast<const float*>(pixels), height, width, dim, reinterpret_cast<float*>(latents),
                        threads);
          },
          "pixels float32 [height, width, 3] to latents float32 [height / patch * width / patch, dim].")
      .def("rest", &VqNetworks::rest, "Gives working memory back.");
}

}  // namespace fastigpt
