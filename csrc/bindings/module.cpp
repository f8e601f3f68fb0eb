// The Python module fastigpt._C. Each part binds itself in a file of its own; nothing here links torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "fastigpt/bandwidth.h"
#include "fastigpt/isa.h"
#include "fastigpt/threads.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of fastigpt";
  m.def(
      "supported_isas",
      [] {
        std::vector<std::string> names;
        for (auto isa : fastigpt::supported_isas()) names.emplace_back(fastigpt::isa_name(isa));
        return names;
      },
      "Instruction sets this processor runs, slowest first.");
  m.def(
      "read_bandwidth",
      [](std::size_t bytes, int threads, int repeats) {
        if (bytes < (1u << 20) || threads < 1 || threads > fastigpt::kMaxThreads || repeats < 1)
          throw py::value_error("read_bandwidth needs bytes >= 2**20, threads between 1 and 1024, repeats >= 1");
        py::gil_scoped_release release;
        return fastigpt::read_bandwidth(bytes, threads, repeats);
      },
      py::arg("bytes"), py::arg("threads"), py::arg("repeats"), "Bytes read per second, once for each repeat.");
  m.def("helper_threads", &fastigpt::helper_threads, "Threads that the operators of this process share.");
  m.attr("MAX_THREADS") = fastigpt::kMaxThreads;
#ifdef FASTIGPT_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  fastigpt::bind_engine(m);
  fastigpt::bind_operators(m);
  fastigpt::bind_nearest_centroid(m);
  fastigpt::bind_vq_networks(m);
}
