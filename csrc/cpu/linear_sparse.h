// Linear layer of dense fp32 activations with unstructured sparse fp32 weights.
#pragma once

#include "conv2d_sparse.h"

namespace cnncomp {

struct LinearSparseArgs {
  const float* x;  // (m, c)
  int64_t m, c;
  SparseWeights weights;
  int64_t k;
  const float* bias;      // (k), or null
  const float* residual;  // (m, k), or null
  float lo, hi;
  float* out;  // (m, k)
  int num_threads;
};

// out = clamp(x * weights^T + bias + residual, lo, hi). Throws std::invalid_argument for a block out of range.
void linear_sparse(const LinearSparseArgs& args);

}  // namespace cnncomp
