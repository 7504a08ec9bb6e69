// Convolution with one input channel a group, directly: nothing is shared between channels, so tensor cores have nothing
// to do. A thread computes kPixels neighbouring output columns of kVec neighbouring channels, so a tap's weights are read
// once for all of them.

#include "cuda/conv_params.cuh"

namespace cnncomp::cuda {
namespace {

constexpr int kPixels = 4, kThreads = 128;

}  // namespace

// kVec = 4 needs as many output as input channels, a multiple of 4, and 4-byte aligned images; kVec = 1 needs nothing.
template <int kVec, bool kSigned>
__global__ void __launch_bounds__(kThreads) depthwise_int8_kernel(const ConvParams p) {
  const int vectors = p.epilogue.k / kVec, strips = (p.q + kPixels - 1) / kPixels;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int channel = static_cast<int>(index % vectors) * kVec;
  int64_t rest = index / vectors;
  const int q0 = static_cast<int>(rest % strips) * kPixels;
  rest /= strips;  // image * p + row
  if (rest >= static_cast<int64_t>(p.n) * p.p) return;
  const int row = static_cast<int>(rest % p.p), h0 = row * p.stride_h - p.pad_h, w0 = q0 * p.stride_w - p.pad_w;
  const int8_t* image = p.x + rest / p.p * p.h * p.w * p.c + channel / p.k_group;
  const int8_t* weight = p.weight + static_cast<int64_t>(channel) * p.r * p.s;

  int32_t acc[kPixels][kVec] = {};
  for (int tap = 0; tap < p.r * p.s; ++tap) {
    const int h = h0 + tap / p.s * p.dil_h, w = w0 + tap % p.s * p.dil_w;
    if (static_cast<uint32_t>(h) >= static_cast<uint32_t>(p.h)) continue;
    int32_t taps[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) taps[i] = __ldg(weight + i * p.r * p.s + tap);
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      const int column = w + j * p.stride_w;
      if (static_cast<uint32_t>(column) >= static_cast<uint32_t>(p.w)) continue;
      const int8_t* at = image + (static_cast<int64_t>(h) * p.w + column) * p.c;
      const uint32_t word = kVec == 4 ? __ldg(reinterpret_cast<const uint32_t*>(at)) : static_cast<uint8_t>(__ldg(at));
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const int byte = word >> (8 * i) & 0xff;
        acc[j][i] += (kSigned ? static_cast<int8_t>(byte) : byte) * taps[i];
      }
    }
  }

  const ChannelConstants<kVec> constants = load_constants<kVec>(p.epilogue, 0, channel);
#pragma unroll
  for (int j = 0; j < kPixels; ++j)
    if (q0 + j < p.q) finish<kVec>(acc[j], constants, p.epilogue, rest * p.q + q0 + j, 0, channel);
}

namespace {

template <int kVec>
Launch plan_vector(const Conv2d& conv) {
  Launch launch;
  launch.kernel = "depthwise_int8_" + std::to_string(kVec) + (conv.x_signed ? "_s8" : "_u8");
  launch.function = conv.x_signed ? reinterpret_cast<const void*>(&depthwise_int8_kernel<kVec, true>)
                                  : reinterpret_cast<const void*>(&depthwise_int8_kernel<kVec, false>);
  const int64_t threads = static_cast<int64_t>(conv.n) * conv.p() * ceil_div(conv.q(), kPixels) * (conv.k / kVec);
  const int64_t blocks = ceil_div(threads, kThreads);
  if (blocks > INT32_MAX) throw std::invalid_argument(launch.kernel + ": " + std::to_string(blocks) + " thread blocks");
  launch.grid[0] = static_cast<uint32_t>(blocks);
  launch.block = kThreads;
  // To the epilogue all channels are one group: their numbers are global in this kernel.
  launch.set_params(conv_params(conv, epilogue_params(conv, conv.k, kVec)));
  return launch;
}

}  // namespace

Launch plan_depthwise_int8(const Conv2d& conv) {
  const bool vectors = conv.k == conv.c && conv.c % 4 == 0 && aligned(conv.x, 4);
  return vectors ? plan_vector<4>(conv) : plan_vector<1>(conv);
}

}  // namespace cnncomp::cuda
