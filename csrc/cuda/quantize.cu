// Floats to 8 bit with zero point 0: x * inv_scale, clamped, rounded half to even; NaN becomes the lowest value. Images become NHWC
// on the way.

#include "cuda/passes.h"
#include "cuda/epilogue.cuh"

namespace cnncomp::cuda {
namespace {

constexpr int kThreads = 128, kVec = 4;

struct QuantizeParams {
  const void* x;
  uint8_t* out;
  DType x_dtype;
  int64_t count;       // elements; of planes, pixels of all images
  int32_t c, pixels;   // of planes: channels, pixels of an image
  int32_t vectors;     // kVec elements may be moved at once
  float inv_scale, lo, hi;
};

}  // namespace

// A thread takes kVec neighbouring elements, or with kPlanes, of (n, c, pixels), kVec channels of a pixel: a warp reads neighbouring
// pixels of each plane.
template <bool kPlanes>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const QuantizeParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, first = kPlanes ? index : index * kVec;
  if (first >= p.count) return;
  const int channel = kPlanes ? blockIdx.y * kVec : 0;
  const int left = static_cast<int>(kPlanes ? min(p.c - channel, kVec) : min(p.count - first, static_cast<int64_t>(kVec)));
  const int real = p.vectors && left == kVec ? kVec : -left;
  float t[kVec];
  with_type<uint8_t>(p.x_dtype, [&](auto* type) {
    const auto* src = static_cast<const std::remove_pointer_t<decltype(type)>*>(p.x);
    if constexpr (kPlanes) {
      const uint32_t image = static_cast<uint32_t>(first) / p.pixels, pixel = static_cast<uint32_t>(first) % p.pixels;
      src += (static_cast<int64_t>(image) * p.c + channel) * p.pixels + pixel;
#pragma unroll
      for (int i = 0; i < kVec; ++i) t[i] = i < left ? to_float(src[static_cast<int64_t>(i) * p.pixels]) : 0.0f;
    } else {
      src += first;
      if constexpr (sizeof(*type) == 4) load_floats(t, src, real);
      if constexpr (sizeof(*type) == 2) load_halves(t, src, real);
    }
  });
#pragma unroll
  for (int i = 0; i < kVec; ++i) t[i] = fminf(fmaxf(__fmul_rn(t[i], p.inv_scale), p.lo), p.hi);  // fmaxf of NaN is the other
  store_bytes(t, p.out + (kPlanes ? first * p.c + channel : first), real);
}

Launch plan_quantize(const Quantize& q) {
  Launch launch;
  launch.kernel = q.channels_last ? "quantize_rows" : "quantize_planes";
  if (size_of(q.x_dtype) == 1 || size_of(q.out_dtype) != 1)
    throw std::invalid_argument("quantize: dtype codes " + std::to_string(static_cast<int>(q.x_dtype)) + " and " +
                                std::to_string(static_cast<int>(q.out_dtype)) + ", expected 2 to 4 to 0 or 1");
  const int64_t pixels = static_cast<int64_t>(q.n) * q.pixels, channels = ceil_div(q.c, kVec);
  QuantizeParams p = {q.x, static_cast<uint8_t*>(q.out), q.x_dtype, q.channels_last ? pixels * q.c : pixels};
  p.c = q.c, p.pixels = q.pixels, p.inv_scale = q.inv_scale;
  p.lo = q.out_dtype == DType::kInt8 ? -128.0f : 0.0f, p.hi = p.lo + 255.0f;
  const bool places = q.channels_last ? aligned(q.x, kVec * size_of(q.x_dtype)) : q.c % kVec == 0;
  p.vectors = places && aligned(q.out, kVec) ? 1 : 0;
  const int64_t blocks = ceil_div(p.count, q.channels_last ? kThreads * kVec : kThreads);
  if (blocks > INT32_MAX || (!q.channels_last && (pixels > INT32_MAX || channels > 65535)))
    throw std::invalid_argument(launch.kernel + ": " + std::to_string(pixels) + " pixels of " + std::to_string(q.c) +
                                " channels; at most 2^31 - 1 pixels of 262140 are possible");
  launch.function = q.channels_last ? reinterpret_cast<const void*>(&quantize_kernel<false>)
                                    : reinterpret_cast<const void*>(&quantize_kernel<true>);
  launch.grid[0] = static_cast<uint32_t>(blocks), launch.grid[1] = q.channels_last ? 1 : static_cast<uint32_t>(channels);
  launch.block = kThreads;
  launch.set_params(p);
  return launch;
}

}  // namespace cnncomp::cuda
