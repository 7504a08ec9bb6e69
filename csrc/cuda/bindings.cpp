// cnncomp._cuda: the int8 kernels on raw device pointers. Importing it needs no driver.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/passes.h"
#include "cuda/launch.h"

namespace py = pybind11;
namespace cuda = cnncomp::cuda;

namespace {

cuda::DType dtype_of(int code) {
  if (code < 0 || code > 4) throw std::invalid_argument("dtype code: got " + std::to_string(code) + ", expected 0 to 4");
  return static_cast<cuda::DType>(code);
}

void check_sizes(const cuda::Conv2d& c) {
  const bool positive = c.c > 0 && c.k > 0 && c.r > 0 && c.s > 0 && c.stride_h > 0 && c.stride_w > 0 && c.dil_h > 0 &&
                        c.dil_w > 0 && c.groups > 0 && c.n >= 0 && c.pad_h >= 0 && c.pad_w >= 0;
  if (!positive) throw std::invalid_argument("conv2d_int8: a size, stride, dilation or group count is not positive");
  if (c.c % c.groups || c.k % c.groups)
    throw std::invalid_argument("conv2d_int8: " + std::to_string(c.c) + " input and " + std::to_string(c.k) +
                                " output channels, expected multiples of groups=" + std::to_string(c.groups));
}

// Arguments in the order of the Python functions; dtype codes 0 uint8, 1 int8, 2 float32, 3 float16, 4 bfloat16; pointers as integers, 0 for none.
cuda::Conv2d make_conv(uintptr_t x, int x_dtype, int n, int h, int w, int c, uintptr_t weight, int k, int r, int s,
                       int stride_h, int stride_w, int pad_h, int pad_w, int dil_h, int dil_w, int groups,
                       uintptr_t constants, uintptr_t residual, int residual_dtype, float residual_scale, float lo,
                       uintptr_t out, int out_dtype) {
  cuda::Conv2d conv = {};
  conv.x = reinterpret_cast<const void*>(x);
  conv.weight = reinterpret_cast<const int8_t*>(weight);
  conv.epilogue = {reinterpret_cast<const float*>(constants), reinterpret_cast<const void*>(residual),
                   reinterpret_cast<void*>(out),              dtype_of(residual_dtype),
                   dtype_of(out_dtype),                       residual_scale,
                   lo,                                        cuda::Activation::kNone,
                   1.0f};
  conv.x_dtype = dtype_of(x_dtype), conv.x_signed = conv.x_dtype == cuda::DType::kInt8;
  conv.n = n, conv.h = h, conv.w = w, conv.c = c, conv.k = k, conv.r = r, conv.s = s;
  conv.stride_h = stride_h, conv.stride_w = stride_w, conv.pad_h = pad_h, conv.pad_w = pad_w;
  conv.dil_h = dil_h, conv.dil_w = dil_w, conv.groups = groups;
  check_sizes(conv);
  return conv;
}

// What a function takes: bytes, with any output and residual; bytes, with no halves. Other plans look at types themselves.
enum class Inputs { kBytes, kNoHalves, kOthers };

void refuse(const char* name, const char* argument, cuda::DType got, const char* expected) {
  throw std::invalid_argument(std::string(name) + ": " + argument + ": got dtype code " + std::to_string(static_cast<int>(got)) +
                              ", expected " + expected);
}

void check_inputs(const char*, Inputs, const cuda::Quantize&) {}
void check_inputs(const char* name, Inputs inputs, const cuda::Conv2d& c) {
  if (inputs != Inputs::kOthers && cuda::size_of(c.x_dtype) != 1) refuse(name, "x", c.x_dtype, "0 (uint8) or 1 (int8)");
  if (inputs != Inputs::kNoHalves) return;
  const cuda::Epilogue& e = c.epilogue;
  if (cuda::is_half(e.out_dtype)) refuse(name, "out", e.out_dtype, "0 to 2 (no half precision)");
  if (e.residual && cuda::is_half(e.residual_dtype)) refuse(name, "residual", e.residual_dtype, "0 to 2 (no half precision)");
}

bool empty(const cuda::Quantize& q) { return q.n == 0 || q.pixels == 0 || q.c == 0; }
bool empty(const cuda::Conv2d& c) { return c.n == 0 || c.h <= 0 || c.w <= 0 || c.p() <= 0 || c.q() <= 0; }

py::dict as_dict(const cuda::Launch& launch) {
  py::dict d;
  d["kernel"] = launch.kernel;
  d["grid"] = py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]);
  d["block"] = launch.block;
  d["shared"] = launch.shared;
  d["shared_turing"] = launch.shared_turing;
  d["whole"] = launch.whole;
  d["parts"] = launch.parts;
  d["params"] = py::bytes(launch.params.data(), launch.params.size());
  return d;
}

// Defines `name` (plans and launches on a device and stream) and `plan_name` (plans only) for a function that makes a Conv2d or
// another request, and one that plans it for a device of which it knows some numbers.
template <typename Request, typename... Args, typename... About>
void define(py::module_& m, const char* name, const char* doc, Inputs inputs, Request (*make)(Args...),
            cuda::Launch (*plan)(const Request&, About...)) {
  auto checked = [name, inputs, make](Args... args) {
    const Request request = make(args...);
    check_inputs(name, inputs, request);
    return request;
  };
  m.def(
      name,
      [checked, plan](int device, uintptr_t stream, About... about, Args... args) {
        const Request request = checked(args...);
        if (!empty(request)) cuda::run(plan(request, about...), device, reinterpret_cast<void*>(stream));
      },
      doc, py::call_guard<py::gil_scoped_release>());
  m.def((std::string("plan_") + name).c_str(),
        [checked, plan](About... about, Args... args) { return as_dict(plan(checked(args...), about...)); },
        "The kernel, grid, block and parameter bytes that the call would launch with. Touches no device.");
}

cuda::Conv2d make_linear(uintptr_t x, int x_dtype, int m, int c, uintptr_t weight, int k, uintptr_t constants,
                         uintptr_t residual, int residual_dtype, float residual_scale, float lo, uintptr_t out,
                         int out_dtype) {
  return make_conv(x, x_dtype, m, 1, 1, c, weight, k, 1, 1, 1, 1, 0, 0, 1, 1, 1, constants, residual, residual_dtype,
                   residual_scale, lo, out, out_dtype);
}

cuda::Conv2d make_image(uintptr_t x, int x_dtype, int n, int h, int w, int c, uintptr_t out) {
  return make_conv(x, x_dtype, n, h, w, c, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0.0f, 0.0f, out, x_dtype);
}

cuda::Conv2d make_pool(uintptr_t x, int x_dtype, int n, int h, int w, int c, int r, int s, int stride_h, int stride_w, int pad_h,
                       int pad_w, int dil_h, int dil_w, uintptr_t out) {
  return make_conv(x, x_dtype, n, h, w, c, 0, c, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, c, 0, 0, 0, 0.0f, 0.0f, out,
                   x_dtype);
}

cuda::Conv2d make_mean_shift(uintptr_t x, int x_dtype, int n, int h, int w, int c, int k, int r, int s, int stride_h, int stride_w,
                             int pad_h, int pad_w, int dil_h, int dil_w, int groups, uintptr_t shift, uintptr_t out) {
  return make_conv(x, x_dtype, n, h, w, c, 0, k, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups, shift, 0, 0, 0.0f,
                   0.0f, out, 2);
}

cuda::Quantize make_quantize(uintptr_t x, int x_dtype, int n, int pixels, int c, bool channels_last, float inv_scale, uintptr_t out,
                             int out_dtype) {
  if (n < 0 || pixels < 0 || c < 0) throw std::invalid_argument("quantize: a negative size");
  return {reinterpret_cast<const void*>(x), reinterpret_cast<void*>(out), dtype_of(x_dtype), dtype_of(out_dtype), n, pixels, c,
          channels_last, inv_scale};
}

// A layer with trailing arguments: workspace, its bytes, the caller's wish, activation (0 none, 1 SiLU, 2 hardswish), and the factor
// behind it.
template <auto kMake, typename... Args>
cuda::Conv2d with_options(Args... args, uintptr_t workspace, int64_t bytes, const std::string& tile, int parts, int activation,
                          float out_factor) {
  cuda::Conv2d conv = kMake(args...);
  if (activation < 0 || activation > 2)
    throw std::invalid_argument("activation: got " + std::to_string(activation) + ", expected 0 to 2");
  conv.workspace = {reinterpret_cast<void*>(workspace), bytes};
  conv.wish = {tile, parts};
  conv.epilogue.activation = static_cast<cuda::Activation>(activation), conv.epilogue.out_factor = out_factor;
  return conv;
}
template <auto kMake, typename... Args>
auto add_options(cuda::Conv2d (*)(Args...)) {
  return &with_options<kMake, Args...>;
}

// A convolution whose output, with a trailing argument, lies in units of images as its input does.
template <auto kMake, typename... Args>
cuda::Conv2d with_units(Args... args, bool out_units) {
  cuda::Conv2d conv = kMake(args...);
  conv.out_units = out_units;
  return conv;
}
template <auto kMake, typename... Args>
auto add_units(cuda::Conv2d (*)(Args...)) {
  return &with_units<kMake, Args...>;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "int8 CUDA kernels on raw device pointers; see cnncomp.ops.cuda.";
  py::register_exception<cuda::CudaError>(m, "CudaError", PyExc_RuntimeError);
  define(m, "conv2d_int8",
         "conv2d_int8(device, stream, multiprocessors, x, x_dtype, n, h, w, c, weight, k, r, s, stride_h, stride_w, pad_h, "
         "pad_w, dil_h, dil_w, groups, constants, residual, residual_dtype, residual_scale, lo, out, out_dtype, workspace, "
         "workspace_bytes, tile, parts, activation, out_factor)",
         Inputs::kBytes, add_options<&make_conv>(&make_conv), &cuda::plan_conv2d_int8);
  define(m, "linear_int8",
         "linear_int8(device, stream, multiprocessors, x, x_dtype, m, c, weight, k, constants, residual, residual_dtype, "
         "residual_scale, lo, out, out_dtype, workspace, workspace_bytes, tile, parts, activation, out_factor)",
         Inputs::kBytes, add_options<&make_linear>(&make_linear), &cuda::plan_conv2d_int8);
  define(m, "conv2d_sparse24_int8",
         "conv2d_sparse24_int8(device, stream, multiprocessors, shared, x, ..., out_dtype), as conv2d_int8; weight: packed by "
         "cnncomp.sparsity.pack_2to4; shared: bytes of shared memory of a multiprocessor. sm_80 and later.",
         Inputs::kNoHalves, &make_conv, &cuda::plan_conv2d_sparse24_int8);
  define(m, "conv2d_sparse24_f16",
         "conv2d_sparse24_f16(device, stream, multiprocessors, shared, x, x_dtype, ...), as conv2d_sparse24_int8, of float16 or "
         "bfloat16.",
         Inputs::kOthers, &make_conv, &cuda::plan_conv2d_sparse24_f16);
  const char* blocks =
      "As conv2d_int8, or of float16 or bfloat16; weight: packed by cnncomp.sparsity.pack_gathered. sm_80 and later.";
  define(m, "conv2d_blocks_int8", blocks, Inputs::kNoHalves, &make_conv, &cuda::plan_conv2d_blocks_int8);
  define(m, "conv2d_blocks_f16", blocks, Inputs::kOthers, &make_conv, &cuda::plan_conv2d_blocks_f16);
  const char* vectors =
      "As conv2d_int8, or of float16 or bfloat16; weight: packed by cnncomp.sparsity.pack_vectors; x: laid out by "
      "cnncomp.sparsity.vectors.to_units; out_units, last: so are the output and the residual. sm_80 and later.";
  define(m, "conv2d_vectors_int8", vectors, Inputs::kNoHalves, add_units<&make_conv>(&make_conv), &cuda::plan_conv2d_vectors_int8);
  define(m, "conv2d_vectors_f16", vectors, Inputs::kOthers, add_units<&make_conv>(&make_conv), &cuda::plan_conv2d_vectors_f16);
  const char* vnm =
      "As conv2d_int8, or of float16 or bfloat16; weight: packed by cnncomp.sparsity.pack_vnm; x: laid out by "
      "cnncomp.sparsity.vnm.to_units; out_units, last: so are the output and the residual. sm_80 and later.";
  define(m, "conv2d_vnm_int8", vnm, Inputs::kNoHalves, add_units<&make_conv>(&make_conv), &cuda::plan_conv2d_vnm_int8);
  define(m, "conv2d_vnm_f16", vnm, Inputs::kOthers, add_units<&make_conv>(&make_conv), &cuda::plan_conv2d_vnm_f16);
  define(m, "linear_sparse24_int8",
         "linear_sparse24_int8(device, stream, multiprocessors, shared, x, ..., out_dtype), as linear_int8 with the weight of "
         "conv2d_sparse24_int8.",
         Inputs::kNoHalves, &make_linear, &cuda::plan_conv2d_sparse24_int8);
  define(m, "to_units",
         "to_units(device, stream, x, x_dtype, n, h, w, c, out): NHWC images into units of eight, for conv2d_vectors_*; c is a "
         "multiple of 16 bytes.",
         Inputs::kOthers, &make_image, &cuda::plan_to_units);
  define(m, "to_byte_units",
         "to_byte_units(device, stream, x, x_dtype, n, h, w, c, out): 8-bit NHWC images into units of sixteen, up to eight into one "
         "of eight, for conv2d_vnm_int8; c is a multiple of 16.",
         Inputs::kBytes, &make_image, &cuda::plan_to_byte_units);
  define(m, "max_pool2d_int8",
         "max_pool2d_int8(device, stream, p, q, x, x_dtype, n, h, w, c, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, out): "
         "of 8-bit NHWC images, to p x q pixels.",
         Inputs::kBytes, &make_pool, &cuda::plan_max_pool2d_int8);
  define(m, "mean_shift_int8",
         "mean_shift_int8(device, stream, x, x_dtype, n, h, w, c, k, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups, "
         "shift, out): shift[k] times the sum of the inputs under each output's window, float32 like the output.",
         Inputs::kBytes, &make_mean_shift, &cuda::plan_mean_shift_int8);
  define(m, "mean_pool2d", "mean_pool2d(device, stream, x, x_dtype, n, h, w, c, out): over all pixels of float32 NHWC images.",
         Inputs::kOthers, &make_image, &cuda::plan_mean_pool2d);
  define(m, "quantize",
         "quantize(device, stream, x, x_dtype, n, pixels, c, channels_last, inv_scale, out, out_dtype): floats (n, pixels, c), or "
         "(n, c, pixels) without channels_last, to 8-bit (n, pixels, c).",
         Inputs::kOthers, &make_quantize, &cuda::plan_quantize);
  m.attr("WORKSPACE_BYTES") = cuda::kWorkspaceBytes;
  m.def(
      "capture_id",
      [](int device, uintptr_t stream) { return cuda::capture_id(device, reinterpret_cast<void*>(stream)); },
      "A number of the graph that the stream is captured into; 0 if it isn't captured.");
  m.def("supports", &cuda::supports, "Whether this build holds machine code for the device.");
  m.def("device_count", &cuda::device_count, "CUDA devices; 0 without a driver.");
  m.def("device_info", [](int device) {
    const cuda::DeviceInfo info = cuda::device_info(device);
    py::dict d;
    d["name"] = info.name;
    d["capability"] = py::make_tuple(info.major, info.minor);
    d["multiprocessors"] = info.multiprocessors;
    return d;
  });
}
