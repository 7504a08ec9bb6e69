#include "conv2d_depthwise.h"

#include <algorithm>
#include <stdexcept>

#include "conv2d_depthwise_kernel.h"
#include "cpuid.h"
#include "parallel.h"

namespace cnncomp {
namespace {

DepthwiseKernel kernel() {
#if defined(__x86_64__)
  const Isa isa = current_isa();
  if (isa == Isa::avx512 || isa == Isa::avx512vnni) return kDepthwiseAvx512;
  if (isa != Isa::baseline) return kDepthwiseAvx2;
#endif
  return kDepthwiseBaseline;
}

int64_t output_size(int64_t in, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  return (in + 2 * pad - dilation * (taps - 1) - 1) / stride + 1;
}

void check(const Conv2dDepthwiseArgs& a) {
  const int64_t smallest = std::min({a.r, a.s, a.stride_h, a.stride_w, a.dil_h, a.dil_w});
  if (smallest < 1 || a.pad_h < 0 || a.pad_w < 0) {
    throw std::invalid_argument("conv2d_depthwise: kernel, stride and dilation must be at least 1, padding at least 0");
  }
  if (a.h + 2 * a.pad_h <= a.dil_h * (a.r - 1) || a.w + 2 * a.pad_w <= a.dil_w * (a.s - 1)) {
    throw std::invalid_argument("conv2d_depthwise: the kernel is larger than the padded image");
  }
}

}  // namespace

void conv2d_depthwise(const Conv2dDepthwiseArgs& a) {
  check(a);
  const DepthwiseKernel plane = kernel();
  const int64_t p = output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h);
  const int64_t q = output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w);
  parallel_for(a.num_threads, a.n * a.c, [&](int64_t i) {
    const int64_t c = i % a.c;
    plane({a.x + i * a.h * a.w, a.h, a.w, a.weight + c * a.r * a.s, a.r, a.s, a.stride_h, a.stride_w, a.pad_h, a.pad_w,
           a.dil_h, a.dil_w, a.bias != nullptr ? a.bias[c] : 0.0f, a.residual != nullptr ? a.residual + i * p * q : nullptr,
           a.out + i * p * q, p, q, a.lo, a.hi});
  });
}

}  // namespace cnncomp
