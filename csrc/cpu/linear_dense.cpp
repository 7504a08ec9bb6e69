#include "linear_dense.h"

#include <algorithm>

#include "cpuid.h"
#include "driver.h"
#include "linear_dense_kernel.h"
#include "parallel.h"

namespace cnncomp {
namespace {

DotKernel kernel() {
  return CNNCOMP_FP32_KERNELS(kDot);
}

}  // namespace

void linear_dense(const LinearDenseArgs& a) {
  constexpr int64_t kOutputs = 32;  // of a task
  const DotKernel dot = kernel();
  parallel_for(a.num_threads, ceil_div(a.k, kOutputs), [&](int64_t task) {
    for (int64_t k = task * kOutputs; k < std::min(a.k, (task + 1) * kOutputs); k++) {
      for (int64_t m = 0; m < a.m; m += kLinearRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kLinearRows, a.m - m));
        float sums[kLinearRows];
        dot(a.x + m * a.c, a.c, rows, a.weight + k * a.c, a.c, sums);
        for (int i = 0; i < rows; i++) {
          const int64_t at = (m + i) * a.k + k;
          float t = sums[i];
          if (a.bias != nullptr) t += a.bias[k];
          if (a.residual != nullptr) t += a.residual[at];
          a.out[at] = clamp(t, a.lo, a.hi);
        }
      }
    }
  });
}

}  // namespace cnncomp
