// What the driver of the depthwise convolution and its kernels, compiled once per instruction set, say to each other.
#pragma once

#include <cstdint>

namespace cnncomp {

// Channels of one image, one after the other.
struct DepthwisePlanes {
  int64_t planes;
  const float* x;  // (planes, h, w), x_pitch floats from one to the next
  int64_t h, w, x_pitch;
  const float* weight;  // (planes, r, s)
  int64_t r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  const float* bias;      // (planes), or null
  const float* residual;  // (planes, p, q), or null
  float* out;             // (planes, p, q), out_pitch floats from one to the next
  int64_t p, q, out_pitch;
  float lo, hi;
};

using DepthwiseKernel = void (*)(const DepthwisePlanes&);

extern const DepthwiseKernel kDepthwiseBaseline;
extern const DepthwiseKernel kDepthwiseAvx2;    // x86-64 only
extern const DepthwiseKernel kDepthwiseAvx512;  // x86-64 only

}  // namespace cnncomp
