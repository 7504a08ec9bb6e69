// mean_shift_int8.cu for one input channel a group: each output channel has a window of its own.

#include "cuda/conv_params.cuh"
#include "cuda/passes.h"

namespace cnncomp::cuda {
namespace {

constexpr int kThreads = 128;

}  // namespace

// A thread an output.
template <bool kSigned>
__global__ void __launch_bounds__(kThreads) mean_shift_depthwise_int8_kernel(const ConvParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= static_cast<int64_t>(p.n) * p.p * p.q * p.epilogue.k) return;
  const int k = static_cast<int>(index % p.epilogue.k);
  const uint32_t pixel = static_cast<uint32_t>(index / p.epilogue.k), strip = pixel / p.q;
  const int h0 = static_cast<int>(strip % p.p) * p.stride_h - p.pad_h, w0 = static_cast<int>(pixel % p.q) * p.stride_w - p.pad_w;
  const int8_t* image = p.x + static_cast<int64_t>(strip / p.p) * p.h * p.w * p.c + k / p.k_group;
  int32_t sum = 0;
  for (int r = 0; r < p.r; ++r) {
    const int h = h0 + r * p.dil_h;
    if (static_cast<uint32_t>(h) >= static_cast<uint32_t>(p.h)) continue;
    for (int s = 0; s < p.s; ++s) {
      const int w = w0 + s * p.dil_w;
      if (static_cast<uint32_t>(w) < static_cast<uint32_t>(p.w)) {
        const int8_t byte = __ldg(image + (static_cast<int64_t>(h) * p.w + w) * p.c);
        sum += kSigned ? byte : static_cast<uint8_t>(byte);
      }
    }
  }
  static_cast<float*>(p.epilogue.e.out)[index] = __fmul_rn(__ldg(p.epilogue.e.constants + k), __int2float_rn(sum));
}

Launch plan_mean_shift_depthwise_int8(const Conv2d& conv) {
  Launch launch;
  launch.kernel = conv.x_signed ? "mean_shift_depthwise_int8_s8" : "mean_shift_depthwise_int8_u8";
  launch.function = conv.x_signed ? reinterpret_cast<const void*>(&mean_shift_depthwise_int8_kernel<true>)
                                  : reinterpret_cast<const void*>(&mean_shift_depthwise_int8_kernel<false>);
  set_mean_shift(launch, conv, ceil_div(static_cast<int64_t>(conv.n) * conv.p() * conv.q() * conv.k, kThreads), kThreads);
  return launch;
}

}  // namespace cnncomp::cuda
