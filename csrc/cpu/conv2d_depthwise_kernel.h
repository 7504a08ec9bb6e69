// What the driver of the depthwise convolution and its kernels, compiled once per instruction set, say to each other.
#pragma once

#include <cstdint>

namespace cnncomp {

// One channel of one image.
struct DepthwisePlane {
  const float* x;  // (h, w)
  int64_t h, w;
  const float* weight;  // (r, s)
  int64_t r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  float bias;
  const float* residual;  // (p, q), or null
  float* out;             // (p, q)
  int64_t p, q;
  float lo, hi;
};

using DepthwiseKernel = void (*)(const DepthwisePlane&);

extern const DepthwiseKernel kDepthwiseBaseline;
extern const DepthwiseKernel kDepthwiseAvx2;    // x86-64 only
extern const DepthwiseKernel kDepthwiseAvx512;  // x86-64 only

}  // namespace cnncomp
