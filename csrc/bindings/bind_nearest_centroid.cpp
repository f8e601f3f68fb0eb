// Python face of the nearest-centroid kernels. Arrays arrive as addresses: fastigpt/nearest has checked them, keeps
// them alive, and knows numpy, torch and the other frameworks; nothing here does.
#include "fastigpt/nearest_centroid.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <thread>

#include "bindings/bindings.h"
#include "fastigpt/threads.h"

namespace py = pybind11;

namespace fastigpt {
namespace {

PointsView view(uintptr_t data, DType dtype, std::vector<int64_t> shape, std::vector<int64_t> strides) {
  check_dtype("points", dtype, {DType::u8, DType::f16, DType::bf16, DType::f32});
  PointsView points{reinterpret_cast<const void*>(data), dtype, shape.back(), strides.back(), {}, {}};
  shape.pop_back();
  strides.pop_back();
  for (size_t axis = 0; axis < shape.size(); ++axis) {  // neighbouring axes that are one run in memory become one axis
    if (!points.shape.empty() && points.strides.back() == shape[axis] * strides[axis]) {
      points.shape.back() *= shape[axis];
      points.strides.back() = strides[axis];
    } else {
      points.shape.push_back(shape[axis]);
      points.strides.push_back(strides[axis]);
    }
  }
  return points;
}

// 0: as many as there are cores.
int thread_count(int threads) {
  if (threads < 0 || threads > kMaxThreads)
    throw std::invalid_argument("threads must be from 1 to " + std::to_string(kMaxThreads) + ", found " +
                                std::to_string(threads));
  return threads > 0 ? threads : std::clamp(int(std::thread::hardware_concurrency()), 1, kMaxThreads);
}

SearchMethod parse_method(const std::string& name) {
  constexpr const char* names[] = {"automatic", "scan", "float32", "int8", "tree", "grid", "table"};
  for (int i = 0; i < int(std::size(names)); ++i)
    if (name == names[i]) return SearchMethod(i);
  throw std::invalid_argument("method must be automatic, scan, float32, int8, tree, grid or table, not '" + name + "'");
}

}  // namespace

void bind_nearest_centroid(py::module_& m) {
  m.def(
      "address_of",
      [](py::handle array) {
        Py_buffer buffer;
        if (PyObject_GetBuffer(array.ptr(), &buffer, PyBUF_STRIDES) != 0) throw py::error_already_set();
        const auto address = reinterpret_cast<uintptr_t>(buffer.buf);
        PyBuffer_Release(&buffer);
        return address;
      },
      "Of a numpy array's first element; five times as fast as asking its __array_interface__.");
  py::class_<CentroidIndex>(m, "CentroidIndex",
                            "A codebook made ready; see csrc/include/fastigpt/nearest_centroid.h. Addresses in, "
                            "addresses out; fastigpt/nearest has checked them.")
      .def(py::init([](uintptr_t centroids, int64_t k, int64_t dim, bool cosine) {
             py::gil_scoped_release release;
             return std::make_unique<CentroidIndex>(reinterpret_cast<const float*>(centroids), k, dim, cosine);
           }),
           py::arg("centroids"), py::arg("k"), py::arg("dim"), py::arg("cosine"))
      .def("holds", [](const CentroidIndex& index,
                       uintptr_t centroids) { return index.holds(reinterpret_cast<const float*>(centroids)); })
      .def("copy",
           [](const CentroidIndex& index, uintptr_t centroids) { index.copy(reinterpret_cast<float*>(centroids)); })
      .def(
          "search",
          [](const CentroidIndex& index, uintptr_t data, const std::string& dtype, std::vector<int64_t> shape,
             std::vector<int64_t> strides, uintptr_t indices, uintptr_t distances, const std::string& isa, int threads,
             const std::string& method) {
            const PointsView points = view(data, parse_dtype("points", dtype), std::move(shape), std::move(strides));
            const Isa chosen = parse_isa(isa);
            const SearchMethod way = parse_method(method);
            py::gil_scoped_release release;
            return index.search(points, reinterpret_cast<int64_t*>(indices), reinterpret_cast<float*>(distances),
                                chosen, thread_count(threads), way);
          },
          py::arg("data"), py::arg("dtype"), py::arg("shape"), py::arg("strides"), py::arg("indices"),
          py::arg("distances"), py::arg("isa"), py::arg("threads"), py::arg("method") = "automatic",
          "Returns the position of a point that is not finite, or -1.")
      .def_property_readonly("nbytes", &CentroidIndex::bytes);

  py::class_<RgbTable>(
      m, "RgbTable", "The nearest centroid of each of the 2^24 colours; see csrc/include/fastigpt/nearest_centroid.h.")
      .def(py::init([](uintptr_t centroids, int64_t k, uintptr_t levels, const std::string& isa, int threads) {
        const Isa chosen = parse_isa(isa);
        py::gil_scoped_release release;
        return std::make_unique<RgbTable>(reinterpret_cast<const double*>(centroids), k,
                                          reinterpret_cast<const double*>(levels), chosen, thread_count(threads));
      }))
      .def("lookup",
           [](const RgbTable& table, uintptr_t data, std::vector<int64_t> shape, std::vector<int64_t> strides,
              uintptr_t indices, int threads) {
             const PointsView points = view(data, DType::u8, std::move(shape), std::move(strides));
             py::gil_scoped_release release;
             table.lookup(points, reinterpret_cast<int64_t*>(indices), thread_count(threads));
           })
      .def_property_readonly("nbytes", &RgbTable::bytes)
      // Copies, as bytes, for a GPU: cells uint32, blocks uint16.
      .def("cells",
           [](const RgbTable& t) { return py::bytes(reinterpret_cast<const char*>(t.cells()), RgbTable::kCells * 4); })
      .def("blocks",
           [](const RgbTable& t) { return py::bytes(reinterpret_cast<const char*>(t.blocks()), t.n_blocks() * 2); });
#ifdef FASTIGPT_WITH_CUDA
  const auto check = [](const char* error) {
    if (error) throw std::runtime_error(std::string("CUDA: ") + error);
  };
  m.def("nearest_centroid_cuda",
        [check](uintptr_t data, const std::string& dtype, std::vector<int64_t> shape, std::vector<int64_t> strides,
                uintptr_t centroids, int64_t k, uintptr_t indices, uintptr_t distances, uintptr_t stream) {
          const PointsView points = view(data, parse_dtype("points", dtype), std::move(shape), std::move(strides));
          check(nearest_centroid_cuda(points, reinterpret_cast<const float*>(centroids), k,
                                      reinterpret_cast<int64_t*>(indices), reinterpret_cast<float*>(distances),
                                      reinterpret_cast<void*>(stream)));
        });
  m.def("rgb_lookup_cuda", [check](uintptr_t data, std::vector<int64_t> shape, std::vector<int64_t> strides,
                                   uintptr_t cells, uintptr_t blocks, uintptr_t indices, uintptr_t stream) {
    const PointsView points = view(data, DType::u8, std::move(shape), std::move(strides));
    check(rgb_lookup_cuda(points, reinterpret_cast<const uint32_t*>(cells), reinterpret_cast<const uint16_t*>(blocks),
                          reinterpret_cast<int64_t*>(indices), reinterpret_cast<void*>(stream)));
  });
#endif
}

}  // namespace fastigpt
