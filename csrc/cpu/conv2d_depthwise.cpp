#include "conv2d_depthwise.h"

#include <algorithm>

#include "conv2d_depthwise_kernel.h"
#include "cpuid.h"
#include "driver.h"
#include "parallel.h"
#include "pitch.h"

namespace cnncomp {
namespace {

constexpr int64_t kTogether = 4096;  // floats of input

DepthwiseKernel kernel() {
  return CNNCOMP_FP32_KERNELS(kDepthwise);
}

}  // namespace

void conv2d_depthwise(const Conv2dDepthwiseArgs& a) {
  constexpr char kName[] = "conv2d_depthwise";
  check_window(kName, a);
  const DepthwiseKernel planes = kernel();
  const int64_t p = output_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h);
  const int64_t q = output_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w);
  const int64_t x_pitch = checked_pitch(kName, a.x_pitch, a.h * a.w), out_pitch = checked_pitch(kName, a.out_pitch, p * q);
  if (a.residual != nullptr) check_same_pitch(kName, checked_pitch(kName, a.residual_pitch, p * q), out_pitch);
  // Planes are taken together as long as they fit a part of the first-level cache.
  const int64_t together = std::clamp<int64_t>(kTogether / (a.h * a.w), 1, a.c), chunks = ceil_div(a.c, together);
  parallel_for(a.num_threads, a.n * chunks, [&](int64_t i) {
    const int64_t c = i % chunks * together, first = i / chunks * a.c + c;
    planes({std::min(together, a.c - c), a.x + first * x_pitch, a.h, a.w, x_pitch, a.weight + c * a.r * a.s, a.r, a.s, a.stride_h,
            a.stride_w, a.pad_h, a.pad_w, a.dil_h, a.dil_w, a.bias != nullptr ? a.bias + c : nullptr,
            a.residual != nullptr ? a.residual + first * out_pitch : nullptr, a.out + first * out_pitch, p, q, out_pitch, a.lo, a.hi});
  });
}

}  // namespace cnncomp
