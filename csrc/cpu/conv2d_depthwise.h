// Depthwise convolution in fp32, images in NCHW.
#pragma once

#include <cstdint>

namespace cnncomp {

struct Conv2dDepthwiseArgs {
  const float* x;  // (n, c, h, w)
  int64_t n, c, h, w;
  const float* weight;  // (c, r, s)
  int64_t r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  const float* bias;      // (c), or null
  const float* residual;  // (n, c, p, q), or null
  float lo, hi;
  float* out;  // (n, c, p, q)
  int num_threads;
  // Floats from a channel to the next one of x, residual and out, the latter two the same; 0: no gap.
  int64_t x_pitch = 0, residual_pitch = 0, out_pitch = 0;
};

// out = clamp(conv2d(x, weight, groups = c) + bias + residual, lo, hi). Throws std::invalid_argument for sizes that give no
// convolution.
void conv2d_depthwise(const Conv2dDepthwiseArgs& args);

}  // namespace cnncomp
