// 8-bit convolution, and linear layers as 1x1 convolutions of 1x1 images.
#pragma once

#include "int8_kernels.h"

namespace cnncomp {

struct Conv2dInt8Args {
  const uint8_t* x;  // (n, h, w, c), int8 if x_signed
  bool x_signed;
  int64_t n, h, w, c;
  const int8_t* weight;  // packed as docs/design.md says, depthwise or not
  int64_t k, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
  bool depthwise;
  const float* constants;  // (3, k): scale, bias, hi; with a shift (4, k)
  const char* residual;    // (n, p, q, k) of residual_dtype, or null
  Dtype residual_dtype;
  float residual_scale, lo;
  char* out;  // (n, p, q, k) of out_dtype
  Dtype out_dtype;
  int num_threads;
  bool shifted;  // weights are scale * q + shift
  Nonlinearity nonlinearity = kNone;
  float out_factor = 1.0f;  // behind a nonlinearity
};

void conv2d_int8(const Conv2dInt8Args& args);

}  // namespace cnncomp
