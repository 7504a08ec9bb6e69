// 8-bit convolution with sparse weights, and linear layers as 1x1 convolutions of 1x1 images.
#pragma once

#include "int8_kernels.h"

namespace cnncomp {

// Weights as docs/design.md packs them ("sparse int8, CPU"; with `scattered` "sparse int8 at random, CPU").
struct SparseInt8Weights {
  const int8_t* values;    // (T, 4)
  const uint16_t* index;   // (T): (quad_in_block * R + r) * S + s; scattered (T, 4): (channel_in_block * R + r) * S + s
  const int32_t* row_ptr;  // (groups * blocks * K / groups + 1)
  int64_t block;           // quads of input channels, or channels, per block
  bool scattered;          // four non-zeros of any channels and taps together
};

struct Conv2dSparseInt8Args {
  const uint8_t* x;  // (n, h, w, c), int8 if x_signed
  bool x_signed;
  int64_t n, h, w, c;
  SparseInt8Weights weights;
  int64_t k, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
  const float* constants;  // (3, k): scale, bias, hi
  const char* residual;    // (n, p, q, k) of residual_dtype, or null
  Dtype residual_dtype;
  float residual_scale, lo;
  char* out;  // (n, p, q, k) of out_dtype
  Dtype out_dtype;
  int num_threads;
  Nonlinearity nonlinearity = kNone;
  float out_factor = 1.0f;  // behind a nonlinearity
};

// Throws std::invalid_argument for sizes that give no convolution.
void conv2d_sparse_int8(const Conv2dSparseInt8Args& args);

// Both in turn, the first of which writes the other's residual. Where they can go together, tile by tile, the first one's
// outputs are not written.
void conv2d_sparse_int8_sum(const Conv2dSparseInt8Args& first, const Conv2dSparseInt8Args& args);

}  // namespace cnncomp
