// Mean over all pixels of float32 NHWC images: each channel summed in the order of its pixels, times 1 / pixels.

#include "cuda/passes.h"
#include "cuda/epilogue.cuh"

namespace cnncomp::cuda {
namespace {

constexpr int kThreads = 64;  // few outputs: small blocks reach more multiprocessors

struct MeanParams {
  const float* x;
  float* out;
  int64_t vectors;  // of all images
  int32_t pixels, c;
  float scale;
};

}  // namespace

// kVec neighbouring channels a thread.
template <int kVec>
__global__ void __launch_bounds__(kThreads) mean_pool2d_kernel(const MeanParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.vectors) return;
  constexpr int kReal = kVec == 1 ? -1 : kVec;
  const int64_t image = index * kVec / p.c, channel = index * kVec % p.c;
  const float* x = p.x + image * p.pixels * p.c + channel;
  float sum[kVec] = {};
#pragma unroll 7
  for (int i = 0; i < p.pixels; ++i) {
    float t[kVec];
    load_floats(t, x + static_cast<int64_t>(i) * p.c, kReal);
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum[j] = __fadd_rn(sum[j], t[j]);
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) sum[j] = __fmul_rn(sum[j], p.scale);
  store_floats(sum, p.out + index * kVec, kReal);
}

Launch plan_mean_pool2d(const Conv2d& pool) {
  const int vec = pool.c % 4 == 0 && aligned(pool.x, 16) && aligned(pool.epilogue.out, 16) ? 4 : 1;
  const int64_t pixels = static_cast<int64_t>(pool.h) * pool.w, vectors = static_cast<int64_t>(pool.n) * (pool.c / vec);
  Launch launch;
  launch.kernel = "mean_pool2d_" + std::to_string(vec) + "_f32";
  if (pool.x_dtype != DType::kFloat32) throw std::invalid_argument(launch.kernel + ": x: expected dtype code 2 (float32)");
  if (pixels > INT32_MAX || vectors > INT32_MAX)
    throw std::invalid_argument(launch.kernel + ": " + std::to_string(pixels) + " pixels of " + std::to_string(pool.n) + " images of " +
                                std::to_string(pool.c) + " channels are too many");
  launch.function = vec == 4 ? reinterpret_cast<const void*>(&mean_pool2d_kernel<4>)
                             : reinterpret_cast<const void*>(&mean_pool2d_kernel<1>);
  launch.grid[0] = static_cast<uint32_t>(ceil_div(vectors, kThreads));
  launch.block = kThreads;
  launch.set_params(MeanParams{static_cast<const float*>(pool.x), static_cast<float*>(pool.epilogue.out), vectors,
                               static_cast<int32_t>(pixels), pool.c, 1.0f / static_cast<float>(pixels)});
  return launch;
}

}  // namespace cnncomp::cuda
