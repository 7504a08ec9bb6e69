// Python function of the fp32 depthwise kernel. Addresses come as integers; 0 stands for an operand that is not there.
#include "bindings.h"
#include "conv2d_depthwise.h"

namespace py = pybind11;

namespace cnncomp {
namespace {

void conv2d(uintptr_t x, int64_t n, int64_t c, int64_t h, int64_t w, uintptr_t weight, int64_t r, int64_t s, int64_t stride_h,
            int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w, uintptr_t bias, uintptr_t residual,
            float lo, float hi, uintptr_t out, int num_threads, Pitch<0> x_pitch, Pitch<3> residual_pitch, Pitch<4> out_pitch) {
  conv2d_depthwise({at<const float>(x), n, c, h, w, at<const float>(weight), r, s, stride_h, stride_w, pad_h, pad_w, dil_h,
                    dil_w, at<const float>(bias), at<const float>(residual), lo, hi, at<float>(out), num_threads, x_pitch.floats,
                    residual_pitch.floats, out_pitch.floats});
}

}  // namespace

void bind_conv2d_depthwise(py::module_& module) {
  using py::arg;
  module.def("conv2d_depthwise", recorded(conv2d), arg("x"), arg("n"), arg("c"), arg("h"), arg("w"), arg("weight"), arg("r"),
             arg("s"), arg("stride_h"), arg("stride_w"), arg("pad_h"), arg("pad_w"), arg("dil_h"), arg("dil_w"), arg("bias"),
             arg("residual"), arg("lo"), arg("hi"), arg("out"), arg("num_threads"), arg("x_pitch") = 0,
             arg("residual_pitch") = 0, arg("out_pitch") = 0, py::call_guard<py::gil_scoped_release>());
}

}  // namespace cnncomp
