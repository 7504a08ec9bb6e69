// What mean-shifted weights, alpha * q + mu, add to a convolution with q: mu times the sum of the inputs under each output's window,
// in fp32, laid out like the output. The product adds it as it adds a residual.

#include "cuda/conv_params.cuh"
#include "cuda/passes.h"

namespace cnncomp::cuda {
namespace {

constexpr int kThreads = 128;

// The sum of kStep bytes.
template <int kStep, bool kSigned>
__device__ __forceinline__ int32_t add_bytes(const int8_t* at, int32_t sum) {
  if constexpr (kStep == 4) {
    const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(at));
    return kSigned ? __dp4a(static_cast<int32_t>(word), 0x01010101, sum)
                   : static_cast<int32_t>(__dp4a(word, 0x01010101u, static_cast<uint32_t>(sum)));
  } else {
    const int8_t byte = __ldg(at);
    return sum + (kSigned ? byte : static_cast<uint8_t>(byte));
  }
}

}  // namespace

void set_mean_shift(Launch& launch, const Conv2d& conv, int64_t blocks, int threads) {
  const int64_t pixels = static_cast<int64_t>(conv.n) * conv.p() * conv.q();
  if (pixels > INT32_MAX || blocks > INT32_MAX)
    throw std::invalid_argument(launch.kernel + ": " + std::to_string(pixels) + " pixels of " + std::to_string(conv.k) +
                                " channels in " + std::to_string(conv.groups) + " groups are too many");
  launch.grid[0] = static_cast<uint32_t>(blocks);
  launch.block = static_cast<uint32_t>(threads);
  launch.set_params(conv_params(conv, epilogue_params(conv, conv.k, 1)));
}

// A warp takes one group's window of a pixel, kStep channels at a time, and then that group's output channels.
template <int kStep, bool kSigned>
__global__ void __launch_bounds__(kThreads) mean_shift_int8_kernel(const ConvParams p) {
  const int lane = threadIdx.x % 32;
  const uint32_t groups = p.c / p.c_group;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (index >= static_cast<int64_t>(p.n) * p.p * p.q * groups) return;
  const int group = static_cast<int>(index % groups);
  const uint32_t pixel = static_cast<uint32_t>(index / groups), strip = pixel / p.q;
  const int h0 = static_cast<int>(strip % p.p) * p.stride_h - p.pad_h, w0 = static_cast<int>(pixel % p.q) * p.stride_w - p.pad_w;
  const int8_t* image = p.x + static_cast<int64_t>(strip / p.p) * p.h * p.w * p.c + group * p.c_group;
  const uint32_t steps = p.c_group / kStep, all = p.r * p.s * steps;
  int32_t sum = 0;
  for (uint32_t i = lane; i < all; i += 32) {
    const uint32_t tap = i / steps;
    const int h = h0 + static_cast<int>(tap / p.s) * p.dil_h, w = w0 + static_cast<int>(tap % p.s) * p.dil_w;
    if (static_cast<uint32_t>(h) >= static_cast<uint32_t>(p.h) || static_cast<uint32_t>(w) >= static_cast<uint32_t>(p.w)) continue;
    sum = add_bytes<kStep, kSigned>(image + (static_cast<int64_t>(h) * p.w + w) * p.c + i % steps * kStep, sum);
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  const float window = __int2float_rn(sum);
  const float* shift = p.epilogue.e.constants + group * p.k_group;
  float* out = static_cast<float*>(p.epilogue.e.out) + static_cast<int64_t>(pixel) * p.epilogue.k + group * p.k_group;
  for (int k = lane; k < p.k_group; k += 32) out[k] = __fmul_rn(__ldg(shift + k), window);
}

Launch plan_mean_shift_int8(const Conv2d& conv) {
  const int32_t c_group = conv.c / conv.groups;
  if (c_group == 1 && conv.groups > 1) return plan_mean_shift_depthwise_int8(conv);
  const bool words = c_group % 4 == 0 && aligned(conv.x, 4);
  auto pick = [&](auto u8, auto s8) { return reinterpret_cast<const void*>(conv.x_signed ? s8 : u8); };
  Launch launch;
  launch.kernel = std::string("mean_shift_int8_") + (words ? "4" : "1") + (conv.x_signed ? "_s8" : "_u8");
  launch.function = words ? pick(&mean_shift_int8_kernel<4, false>, &mean_shift_int8_kernel<4, true>)
                          : pick(&mean_shift_int8_kernel<1, false>, &mean_shift_int8_kernel<1, true>);
  const int64_t pixels = static_cast<int64_t>(conv.n) * conv.p() * conv.q();
  set_mean_shift(launch, conv, ceil_div(pixels * conv.groups, kThreads / 32), kThreads);
  return launch;
}

}  // namespace cnncomp::cuda
