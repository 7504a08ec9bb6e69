#include "pool2d.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpuid.h"
#include "driver.h"
#include "parallel.h"
#include "pitch.h"
#include "pool2d_kernel.h"

namespace cnncomp {
namespace {

const PoolKernels& kernels() {
  return CNNCOMP_FP32_KERNELS(kPool);
}

struct Scratch {
  std::vector<float> line;
  std::vector<const float*> rows;
};

}  // namespace

void max_pool2d(const MaxPool2dArgs& a) {
  constexpr char kName[] = "max_pool2d";
  check_window(kName, a);
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const PoolKernels& pool = kernels();
  const int64_t p = pooled_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h, a.ceil_mode);
  const int64_t q = pooled_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w, a.ceil_mode);
  const int64_t x_pitch = checked_pitch(kName, a.x_pitch, a.h * a.w), out_pitch = checked_pitch(kName, a.out_pitch, p * q);
  const int64_t reach = a.w + 2 * a.pad_w + (kPoolSlack + 1) * a.stride_w;
  parallel_for(a.num_threads, a.n * a.c, [&](int64_t plane) {
    static thread_local Scratch scratch;
    scratch.line.assign(reach, kLowest);
    const float* const x = a.x + plane * x_pitch;
    for (int64_t i = 0; i < p; i++) {
      float* const out = a.out + plane * out_pitch + i * q;
      scratch.rows.clear();
      for (int64_t r = 0; r < a.r; r++) {
        const int64_t row = i * a.stride_h - a.pad_h + r * a.dil_h;
        if (row >= 0 && row < a.h) scratch.rows.push_back(x + row * a.w);
      }
      if (scratch.rows.empty()) {
        std::fill(out, out + q, kLowest);
        continue;
      }
      pool.max_row({scratch.rows.data(), static_cast<int64_t>(scratch.rows.size()), a.w, a.s, a.stride_w, a.pad_w, a.dil_w,
                    scratch.line.data(), out, q});
    }
  });
}

void mean_pool2d(const MeanPool2dArgs& a) {
  const PoolKernels& pool = kernels();
  const float scale = 1.0f / static_cast<float>(a.pixels);
  if (a.channels_last) {
    parallel_for(a.num_threads, a.n, [&](int64_t n) {
      pool.sum_rows(a.x + n * a.pixels * a.c, a.pixels, a.c, a.c, scale, a.out + n * a.c);
    });
    return;
  }
  constexpr int64_t kPlanes = 32;  // of a task
  const int64_t pitch = checked_pitch("mean_pool2d", a.x_pitch, a.pixels);
  parallel_for(a.num_threads, ceil_div(a.n * a.c, kPlanes), [&](int64_t task) {
    for (int64_t i = task * kPlanes; i < std::min(a.n * a.c, (task + 1) * kPlanes); i++) {
      a.out[i] = pool.sum(a.x + i * pitch, a.pixels) * scale;
    }
  });
}

}  // namespace cnncomp
