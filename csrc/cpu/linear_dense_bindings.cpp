// Python function of the dense linear kernel. Addresses come as integers; 0 stands for an operand that is not there.
#include "bindings.h"
#include "linear_dense.h"
#include "program.h"

namespace py = pybind11;

namespace cnncomp {
namespace {

void linear(uintptr_t x, int64_t m, int64_t c, uintptr_t weight, int64_t k, uintptr_t bias, uintptr_t residual, float lo,
            float hi, uintptr_t out, int num_threads) {
  linear_dense({at<const float>(x), m, c, at<const float>(weight), k, at<const float>(bias), at<const float>(residual), lo, hi,
                at<float>(out), num_threads});
}

}  // namespace

void bind_linear_dense(py::module_& module) {
  using py::arg;
  module.def("linear_dense", recorded(linear), arg("x"), arg("m"), arg("c"), arg("weight"), arg("k"), arg("bias"),
             arg("residual"), arg("lo"), arg("hi"), arg("out"), arg("num_threads"),
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace cnncomp
