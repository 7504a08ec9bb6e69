// The Python module cnncomp._cpu. Kernels take addresses and sizes; the checks are in cnncomp/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpuid.h"
#include "parallel.h"

namespace py = pybind11;

PYBIND11_MODULE(_cpu, m) {
  using namespace cnncomp;
  m.doc() = "cnncomp's CPU kernels.";
  m.def(
      "isa_available",
      [] {
        std::vector<std::string> names;
        for (Isa isa : isa_available()) names.emplace_back(isa_name(isa));
        return names;
      },
      "Instruction sets that this machine can run, from the plainest on.");
  m.def("isa", [] { return std::string(isa_name(current_isa())); }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another of isa_available(), process-wide.");
  m.def("set_openmp", &set_openmp, py::arg("gomp_parallel"), py::arg("omp_in_parallel"),
        py::arg("omp_get_thread_num"),
        "Run on the OpenMP runtime with these entry points (addresses).");
  bind_activate(m);
  bind_int8(m);
  bind_conv2d_depthwise(m);
  bind_conv2d_sparse(m);
  bind_linear_dense(m);
  bind_pool2d(m);
  bind_program(m);
}
