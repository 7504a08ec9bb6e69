// Python functions of the fp32 pools. Addresses come as integers.
#include "bindings.h"
#include "pool2d.h"

namespace py = pybind11;

namespace cnncomp {
namespace {

void max_pool(uintptr_t x, int64_t n, int64_t c, int64_t h, int64_t w, int64_t r, int64_t s, int64_t stride_h,
              int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w, uintptr_t out, int num_threads,
              bool ceil_mode, Pitch<0> x_pitch, Pitch<1> out_pitch) {
  max_pool2d({at<const float>(x), n, c, h, w, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, at<float>(out),
              num_threads, x_pitch.floats, out_pitch.floats, ceil_mode});
}

void mean_pool(uintptr_t x, int64_t n, int64_t c, int64_t pixels, bool channels_last, uintptr_t out, int num_threads,
               Pitch<0> x_pitch) {
  mean_pool2d({at<const float>(x), n, c, pixels, channels_last, at<float>(out), num_threads, x_pitch.floats});
}

}  // namespace

void bind_pool2d(py::module_& module) {
  using py::arg;
  module.def("max_pool2d", recorded(max_pool), arg("x"), arg("n"), arg("c"), arg("h"), arg("w"), arg("r"), arg("s"),
             arg("stride_h"), arg("stride_w"), arg("pad_h"), arg("pad_w"), arg("dil_h"), arg("dil_w"), arg("out"),
             arg("num_threads"), arg("ceil_mode") = false, arg("x_pitch") = 0, arg("out_pitch") = 0,
             py::call_guard<py::gil_scoped_release>());
  module.def("mean_pool2d", recorded(mean_pool), arg("x"), arg("n"), arg("c"), arg("pixels"), arg("channels_last"), arg("out"),
             arg("num_threads"), arg("x_pitch") = 0, py::call_guard<py::gil_scoped_release>());
}

}  // namespace cnncomp
