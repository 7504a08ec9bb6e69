// Python functions of the activations. Addresses come as integers; 0 stands for an operand that is not there.
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

void affine(uintptr_t x, int64_t rows, int64_t length, uintptr_t scale, uintptr_t shift, int64_t channels, float lo, float hi,
            uintptr_t out, int num_threads, Pitch<0> x_pitch, Pitch<3> out_pitch) {
  affine_rows({at<const float>(x), rows, length, at<float>(out), num_threads, x_pitch.floats, out_pitch.floats},
              {at<const float>(scale), at<const float>(shift), channels, lo, hi});
}

// Without pitches that a recorded network could change: rows need not be channels.
void copy(uintptr_t x, int64_t rows, int64_t length, uintptr_t out, int64_t out_pitch, int num_threads) {
  copy_rows({at<const float>(x), rows, length, at<float>(out), num_threads, 0, out_pitch});
}

void copy_bytes(uintptr_t x, int64_t rows, int64_t length, uintptr_t out, int64_t out_pitch, int num_threads) {
  copy_byte_rows(at<const uint8_t>(x), rows, length, at<uint8_t>(out), out_pitch, num_threads);
}

}  // namespace

void bind_activate(py::module_& module) {
  using py::arg;
  module.def("activate", recorded(activate_rows), arg("x"), arg("rows"), arg("length"), arg("activation"), arg("out"),
             arg("num_threads"), arg("x_pitch") = 0, arg("out_pitch") = 0, py::call_guard<py::gil_scoped_release>());
  module.def("affine_rows", recorded(affine), arg("x"), arg("rows"), arg("length"), arg("scale"), arg("shift"), arg("channels"),
             arg("lo"), arg("hi"), arg("out"), arg("num_threads"), arg("x_pitch") = 0, arg("out_pitch") = 0,
             py::call_guard<py::gil_scoped_release>());
  module.def("copy_rows", recorded(copy), arg("x"), arg("rows"), arg("length"), arg("out"), arg("out_pitch"),
             arg("num_threads"), py::call_guard<py::gil_scoped_release>());
  module.def("copy_byte_rows", recorded(copy_bytes), arg("x"), arg("rows"), arg("length"), arg("out"), arg("out_pitch"),
             arg("num_threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace cnncomp
