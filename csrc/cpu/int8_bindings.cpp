// Python functions of the int8 kernels. Addresses come as integers; 0 stands for an operand that is not there.
#include <pybind11/pybind11.h>

#include <optional>
#include <utility>

#include "bindings.h"
#include "conv2d_int8.h"
#include "conv2d_sparse_int8.h"
#include "driver.h"
#include "max_pool2d_int8.h"
#include "program.h"
#include "quantize.h"

namespace py = pybind11;

namespace cnncomp {
namespace {

Dtype dtype(int code) {
  if (code < kU8 || code > kF32) throw std::invalid_argument("dtype: expected 0 (uint8), 1 (int8) or 2 (float32)");
  return static_cast<Dtype>(code);
}

Nonlinearity nonlinearity(int code) {
  if (code < kNone || code > kHardswish) throw std::invalid_argument("activation: expected 0 (none), 1 (silu) or 2 (hardswish)");
  return static_cast<Nonlinearity>(code);
}

void conv2d(uintptr_t x, bool x_signed, int64_t n, int64_t h, int64_t w, int64_t c, uintptr_t weight, int64_t k, int64_t r,
            int64_t s, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w,
            int64_t groups, bool depthwise, uintptr_t constants, uintptr_t residual, int residual_dtype,
            float residual_scale, float lo, uintptr_t out, int out_dtype, int num_threads, bool shifted, int activation,
            float out_factor) {
  const Conv2dInt8Args args{at<const uint8_t>(x), x_signed, n, h, w, c, at<const int8_t>(weight), k, r, s, stride_h, stride_w,
                            pad_h, pad_w, dil_h, dil_w, groups, depthwise, at<const float>(constants),
                            at<const char>(residual), dtype(residual_dtype), residual_scale, lo, at<char>(out),
                            dtype(out_dtype), num_threads, shifted, nonlinearity(activation), out_factor};
  check_window("conv2d_int8", args);
  conv2d_int8(args);
}

void conv2d_sparse(uintptr_t x, bool x_signed, int64_t n, int64_t h, int64_t w, int64_t c, uintptr_t values,
                   uintptr_t index, uintptr_t row_ptr, int64_t block, int64_t k, int64_t r, int64_t s, int64_t stride_h,
                   int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w, int64_t groups,
                   uintptr_t constants, uintptr_t residual, int residual_dtype, float residual_scale, float lo,
                   uintptr_t out, int out_dtype, int num_threads, bool scattered, int activation, float out_factor) {
  const SparseInt8Weights weights{at<const int8_t>(values), at<const uint16_t>(index), at<const int32_t>(row_ptr), block,
                                  scattered};
  const Conv2dSparseInt8Args args{at<const uint8_t>(x), x_signed, n, h, w, c, weights, k, r, s, stride_h, stride_w, pad_h,
                                  pad_w, dil_h, dil_w, groups, at<const float>(constants), at<const char>(residual),
                                  dtype(residual_dtype), residual_scale, lo, at<char>(out), dtype(out_dtype), num_threads,
                                  nonlinearity(activation), out_factor};
  static thread_local std::optional<Conv2dSparseInt8Args> left;  // by the step before this one
  if (Program::leaving()) {
    left = args;
  } else if (left && left->out == args.residual) {
    const Conv2dSparseInt8Args first = *std::exchange(left, std::nullopt);
    conv2d_sparse_int8_sum(first, args);
  } else {
    conv2d_sparse_int8(args);
  }
}

void to_8bit(uintptr_t x, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last, uintptr_t out, bool out_signed,
             float inv_scale, int num_threads) {
  quantize({at<const float>(x), n, c, h, w, channels_last, at<uint8_t>(out), out_signed, inv_scale, num_threads});
}

void max_pool2d(uintptr_t x, bool x_signed, int64_t n, int64_t h, int64_t w, int64_t c, int64_t r, int64_t s,
                int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w,
                uintptr_t out, int num_threads, bool ceil_mode) {
  const MaxPool2dInt8Args args{at<const uint8_t>(x), x_signed, n, h, w, c, r, s, stride_h, stride_w, pad_h, pad_w, dil_h,
                               dil_w, at<uint8_t>(out), num_threads, ceil_mode};
  check_window("max_pool2d_int8", args);
  max_pool2d_int8(args);
}

}  // namespace

void bind_int8(py::module_& module) {
  module.def("int8_saturates", [] { return int8_kernels().range != nullptr; },
        "Whether products of bytes, with the instruction set in use, are added in pairs that saturate at 16 bits.");
  using py::arg;
  module.def("conv2d_int8", recorded(conv2d), arg("x"), arg("x_signed"), arg("n"), arg("h"), arg("w"), arg("c"), arg("weight"),
             arg("k"), arg("r"), arg("s"), arg("stride_h"), arg("stride_w"), arg("pad_h"), arg("pad_w"), arg("dil_h"),
             arg("dil_w"), arg("groups"), arg("depthwise"), arg("constants"), arg("residual"), arg("residual_dtype"),
             arg("residual_scale"), arg("lo"), arg("out"), arg("out_dtype"), arg("num_threads"), arg("shifted") = false,
             arg("activation") = 0, arg("out_factor") = 1.0f, py::call_guard<py::gil_scoped_release>());
  module.def("conv2d_sparse_int8", recorded(conv2d_sparse), arg("x"), arg("x_signed"), arg("n"), arg("h"), arg("w"), arg("c"),
             arg("values"), arg("index"), arg("row_ptr"), arg("block"), arg("k"), arg("r"), arg("s"), arg("stride_h"),
             arg("stride_w"), arg("pad_h"), arg("pad_w"), arg("dil_h"), arg("dil_w"), arg("groups"), arg("constants"),
             arg("residual"), arg("residual_dtype"), arg("residual_scale"), arg("lo"), arg("out"), arg("out_dtype"),
             arg("num_threads"), arg("scattered") = false, arg("activation") = 0, arg("out_factor") = 1.0f,
             py::call_guard<py::gil_scoped_release>());
  module.def("quantize", recorded(to_8bit), arg("x"), arg("n"), arg("c"), arg("h"), arg("w"), arg("channels_last"), arg("out"),
             arg("out_signed"), arg("inv_scale"), arg("num_threads"), py::call_guard<py::gil_scoped_release>());
  module.def("max_pool2d_int8", recorded(max_pool2d), arg("x"), arg("x_signed"), arg("n"), arg("h"), arg("w"), arg("c"), arg("r"),
             arg("s"), arg("stride_h"), arg("stride_w"), arg("pad_h"), arg("pad_w"), arg("dil_h"), arg("dil_w"),
             arg("out"), arg("num_threads"), arg("ceil_mode") = false, py::call_guard<py::gil_scoped_release>());
}

}  // namespace cnncomp
