// Convolution of fp32 activations in NCHW with unstructured sparse, or dense, fp32 weights.
#pragma once

#include <cstdint>

namespace cnncomp {

// Weights as docs/design.md packs them ("sparse fp32, CPU").
struct SparseWeights {
  const float* values;
  const uint16_t* index;   // (c_in_block * R + r) * S + s
  const int32_t* row_ptr;  // (groups * blocks * K / groups + 1)
  int64_t block;           // input channels per block
};

// Dense weights as docs/design.md packs them ("dense fp32, CPU"): (groups, blocks, ceil(K / groups / 8), block, R, S, 8).
struct DenseWeights {
  const float* values;
  int64_t block;  // input channels per block
};

template <class Weights>
struct Conv2dArgs {
  const float* x;  // (n, c, h, w)
  int64_t n, c, h, w;
  Weights weights;
  int64_t k, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
  const float* bias;      // (k), or null
  const float* residual;  // (n, k, p, q), or null
  float lo, hi;
  float* out;  // (n, k, p, q)
  int num_threads;
  // Floats from a channel to the next one of x, residual and out, the latter two the same; 0: no gap. What lies in a gap of x may be
  // read, and that of out written; what becomes of it is never part of a result.
  int64_t x_pitch = 0, residual_pitch = 0, out_pitch = 0;
};

using Conv2dSparseArgs = Conv2dArgs<SparseWeights>;
using Conv2dDenseArgs = Conv2dArgs<DenseWeights>;

// out = clamp(conv2d(x, weights) + bias + residual, lo, hi). Throws std::invalid_argument for sizes that give no convolution.
void conv2d_sparse(const Conv2dSparseArgs& args);
void conv2d_dense(const Conv2dDenseArgs& args);

}  // namespace cnncomp
