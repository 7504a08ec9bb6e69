// Max-pool of 8-bit NHWC images. A thread computes kVec neighbouring channels of an output pixel.

#include "cuda/passes.h"
#include "cuda/conv_params.cuh"

namespace cnncomp::cuda {
namespace {

constexpr int kThreads = 128;

}  // namespace

// kVec = 4 needs a multiple of 4 channels and 4-byte aligned images; kVec = 1 needs nothing.
template <int kVec, bool kSigned>
__global__ void __launch_bounds__(kThreads) max_pool2d_int8_kernel(const ConvParams p) {
  using W = typename Word<kVec>::type;
  constexpr uint32_t kFlip = kSigned ? 0x80 : 0;  // makes signed bytes compare as unsigned ones
  const uint32_t vectors = p.c / kVec;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= static_cast<int64_t>(p.n) * p.p * p.q * vectors) return;
  const int channel = static_cast<int>(index % vectors) * kVec;
  const uint32_t pixel = static_cast<uint32_t>(index / vectors), strip = pixel / p.q;
  const int h0 = static_cast<int>(strip % p.p) * p.stride_h - p.pad_h, w0 = static_cast<int>(pixel % p.q) * p.stride_w - p.pad_w;
  const int8_t* image = p.x + static_cast<int64_t>(strip / p.p) * p.h * p.w * p.c + channel;
  uint32_t most[kVec] = {};
  for (int r = 0; r < p.r; ++r) {
    const int h = h0 + r * p.dil_h;
    if (static_cast<uint32_t>(h) >= static_cast<uint32_t>(p.h)) continue;
    for (int s = 0; s < p.s; ++s) {
      const int w = w0 + s * p.dil_w;
      if (static_cast<uint32_t>(w) >= static_cast<uint32_t>(p.w)) continue;
      const uint32_t word = __ldg(reinterpret_cast<const W*>(image + (static_cast<int64_t>(h) * p.w + w) * p.c));
#pragma unroll
      for (int i = 0; i < kVec; ++i) most[i] = max(most[i], (word >> (8 * i) & 0xff) ^ kFlip);
    }
  }
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kVec; ++i) word |= (most[i] ^ kFlip) << (8 * i);
  *reinterpret_cast<W*>(static_cast<uint8_t*>(p.epilogue.e.out) + static_cast<int64_t>(pixel) * p.c + channel) = static_cast<W>(word);
}

namespace {

template <int kVec>
Launch plan_vector(const Conv2d& pool, int p, int q) {
  Launch launch;
  launch.kernel = "max_pool2d_int8_" + std::to_string(kVec) + (pool.x_signed ? "_s8" : "_u8");
  launch.function = pool.x_signed ? reinterpret_cast<const void*>(&max_pool2d_int8_kernel<kVec, true>)
                                  : reinterpret_cast<const void*>(&max_pool2d_int8_kernel<kVec, false>);
  const int64_t pixels = static_cast<int64_t>(pool.n) * p * q;
  const int64_t blocks = ceil_div(pixels * (pool.c / kVec), kThreads);
  if (pixels > INT32_MAX || blocks > INT32_MAX)
    throw std::invalid_argument(launch.kernel + ": " + std::to_string(pixels) + " pixels of " + std::to_string(pool.c) +
                                " channels are too many");
  launch.grid[0] = static_cast<uint32_t>(blocks);
  launch.block = kThreads;
  ConvParams params = conv_params(pool, epilogue_params(pool, pool.k, kVec));
  params.p = p, params.q = q;
  launch.set_params(params);
  return launch;
}

}  // namespace

Launch plan_max_pool2d_int8(const Conv2d& pool, int p, int q) {
  const bool vectors = pool.c % 4 == 0 && aligned(pool.x, 4) && aligned(pool.epilogue.out, 4);
  return vectors ? plan_vector<4>(pool, p, q) : plan_vector<1>(pool, p, q);
}

}  // namespace cnncomp::cuda
