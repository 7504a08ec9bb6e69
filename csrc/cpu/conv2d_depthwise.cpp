#include "conv2d_depthwise.h"

#include "conv2d_depthwise_kernel.h"
#include "cpuid.h"
#include "driver.h"
#include "parallel.h"

namespace cnncomp {
namespace {

DepthwiseKernel kernel() {
  return CNNCOMP_FP32_KERNELS(kDepthwise);
}

}  // namespace

void conv2d_depthwise(const Conv2dDepthwiseArgs& a) {
  check_window("conv2d_depthwise", a);
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
