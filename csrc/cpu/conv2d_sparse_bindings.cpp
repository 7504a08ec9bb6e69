// Python functions of the sparse kernels. Addresses come as integers; 0 stands for an operand that is not there.
#include "bindings.h"
#include "conv2d_sparse.h"
#include "linear_sparse.h"

namespace py = pybind11;

namespace cnncomp {
namespace {

SparseWeights weights(uintptr_t values, uintptr_t index, uintptr_t row_ptr, int64_t block) {
  return {at<const float>(values), at<const uint16_t>(index), at<const int32_t>(row_ptr), block};
}

void conv2d(uintptr_t x, int64_t n, int64_t c, int64_t h, int64_t w, uintptr_t values, uintptr_t index, uintptr_t row_ptr,
            int64_t block, int64_t k, int64_t r, int64_t s, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
            int64_t dil_h, int64_t dil_w, int64_t groups, uintptr_t bias, uintptr_t residual, float lo, float hi,
            uintptr_t out, int num_threads, Pitch<0> x_pitch, Pitch<5> residual_pitch, Pitch<6> out_pitch) {
  conv2d_sparse({at<const float>(x), n, c, h, w, weights(values, index, row_ptr, block), k, r, s, stride_h, stride_w, pad_h,
                 pad_w, dil_h, dil_w, groups, at<const float>(bias), at<const float>(residual), lo, hi, at<float>(out),
                 num_threads, x_pitch.floats, residual_pitch.floats, out_pitch.floats});
}

void dense(uintptr_t x, int64_t n, int64_t c, int64_t h, int64_t w, uintptr_t values, int64_t block, int64_t k, int64_t r,
           int64_t s, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w,
           int64_t groups, uintptr_t bias, uintptr_t residual, float lo, float hi, uintptr_t out, int num_threads, Pitch<0> x_pitch,
           Pitch<3> residual_pitch, Pitch<4> out_pitch) {
  conv2d_dense({at<const float>(x), n, c, h, w, {at<const float>(values), block}, k, r, s, stride_h, stride_w, pad_h, pad_w,
                dil_h, dil_w, groups, at<const float>(bias), at<const float>(residual), lo, hi, at<float>(out), num_threads,
                x_pitch.floats, residual_pitch.floats, out_pitch.floats});
}

void linear(uintptr_t x, int64_t m, int64_t c, uintptr_t values, uintptr_t index, uintptr_t row_ptr, int64_t block, int64_t k,
            uintptr_t bias, uintptr_t residual, float lo, float hi, uintptr_t out, int num_threads) {
  linear_sparse({at<const float>(x), m, c, weights(values, index, row_ptr, block), k, at<const float>(bias),
                 at<const float>(residual), lo, hi, at<float>(out), num_threads});
}

}  // namespace

void bind_conv2d_sparse(py::module_& module) {
  using py::arg;
  module.def("conv2d_sparse", recorded(conv2d), arg("x"), arg("n"), arg("c"), arg("h"), arg("w"), arg("values"), arg("index"),
             arg("row_ptr"), arg("block"), arg("k"), arg("r"), arg("s"), arg("stride_h"), arg("stride_w"), arg("pad_h"),
             arg("pad_w"), arg("dil_h"), arg("dil_w"), arg("groups"), arg("bias"), arg("residual"), arg("lo"), arg("hi"),
             arg("out"), arg("num_threads"), arg("x_pitch") = 0, arg("residual_pitch") = 0, arg("out_pitch") = 0,
             py::call_guard<py::gil_scoped_release>());
  module.def("conv2d_dense", recorded(dense), arg("x"), arg("n"), arg("c"), arg("h"), arg("w"), arg("values"), arg("block"),
             arg("k"), arg("r"), arg("s"), arg("stride_h"), arg("stride_w"), arg("pad_h"), arg("pad_w"), arg("dil_h"),
             arg("dil_w"), arg("groups"), arg("bias"), arg("residual"), arg("lo"), arg("hi"), arg("out"), arg("num_threads"),
             arg("x_pitch") = 0, arg("residual_pitch") = 0, arg("out_pitch") = 0, py::call_guard<py::gil_scoped_release>());
  module.def("linear_sparse", recorded(linear), arg("x"), arg("m"), arg("c"), arg("values"), arg("index"), arg("row_ptr"), arg("block"),
             arg("k"), arg("bias"), arg("residual"), arg("lo"), arg("hi"), arg("out"), arg("num_threads"),
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace cnncomp
