// Linear layers with dense fp32 weights on few rows, as a classifier at small batches: a matrix read once.
#pragma once

#include <cstdint>

namespace cnncomp {

struct LinearDenseArgs {
  const float* x;  // (m, c)
  int64_t m, c;
  const float* weight;  // (k, c)
  int64_t k;
  const float* bias;      // (k), or null
  const float* residual;  // (m, k), or null
  float lo, hi;
  float* out;  // (m, k)
  int num_threads;
};

// out = clamp(x * weight^T + bias + residual, lo, hi).
void linear_dense(const LinearDenseArgs& args);

}  // namespace cnncomp
