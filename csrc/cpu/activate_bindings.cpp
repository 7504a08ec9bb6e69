// Python functions of the activations. Addresses come as integers.
#include "activate.h"
#include "bindings.h"

namespace py = pybind11;

namespace cnncomp {
namespace {

void activate_rows(uintptr_t x, int64_t rows, int64_t length, int activation, uintptr_t out, int num_threads, Pitch<0> x_pitch,
                   Pitch<1> out_pitch) {
  activate({at<const float>(x), rows, length, at<float>(out), num_threads, x_pitch.floats, out_pitch.floats},
           static_cast<Activation>(activation));
}

void scale(uintptr_t x, int64_t rows, int64_t length, uintptr_t factors, uintptr_t out, int num_threads, Pitch<0> x_pitch,
           Pitch<2> out_pitch) {
  scale_rows({at<const float>(x), rows, length, at<float>(out), num_threads, x_pitch.floats, out_pitch.floats},
             at<const float>(factors));
}

}  // namespace

void bind_activate(py::module_& module) {
  using py::arg;
  module.def("activate", recorded(activate_rows), arg("x"), arg("rows"), arg("length"), arg("activation"), arg("out"),
             arg("num_threads"), arg("x_pitch") = 0, arg("out_pitch") = 0, py::call_guard<py::gil_scoped_release>());
  module.def("scale_rows", recorded(scale), arg("x"), arg("rows"), arg("length"), arg("scale"), arg("out"), arg("num_threads"),
             arg("x_pitch") = 0, arg("out_pitch") = 0, py::call_guard<py::gil_scoped_release>());
}

}  // namespace cnncomp
