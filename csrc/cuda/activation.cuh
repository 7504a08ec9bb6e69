// Activations of the epilogue that are no clamps, each a fixed sequence of fp32 additions and multiplications rounded one by one:
// cnncomp/ops/reference.py has the same, so results are the same bits on every device. Within 2e-7 of the exact value, relative
// to the larger of it and 1.
#pragma once

#include "cuda/arch.cuh"
#include "cuda/launch.h"

namespace cnncomp::cuda {

// t / (1 + exp(-t)). exp(-|t|) = 2^y is 2^n with n the nearest integer, times a polynomial of degree 5 in y - n (least relative error
// on +-1/2). y stays in the range of normal numbers. 1 / d, d in (1, 2], by three steps of Newton's from the best line.
__device__ __forceinline__ float silu(float t) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: as in round_to_bytes
  const float y = larger(__fmul_rn(fabsf(t), -1.44269504f), -126.0f);
  const float shifted = __fadd_rn(y, kRound), f = __fadd_rn(y, -__fadd_rn(shifted, -kRound));
  float z = 1.32647273e-3f;
  for (float coefficient : {9.67151299e-3f, 5.55073358e-2f, 2.40222424e-1f, 6.93147004e-1f, 1.0f})
    z = __fadd_rn(__fmul_rn(z, f), coefficient);
  z = __uint_as_float(__float_as_uint(z) + (__float_as_uint(shifted) << 23));
  const float d = __fadd_rn(1.0f, z);
  float inverse = __fadd_rn(1.41176471f, __fmul_rn(d, -4.70588235e-1f));
#pragma unroll
  for (int i = 0; i < 3; ++i) inverse = __fadd_rn(inverse, __fmul_rn(inverse, __fadd_rn(1.0f, -__fmul_rn(d, inverse))));
  return __fmul_rn(t, t < 0.0f ? __fmul_rn(z, inverse) : inverse);
}

// t * clamp(t + 3, 0, 6) / 6
__device__ __forceinline__ float hardswish(float t) {
  const float gate = smaller(larger(__fadd_rn(t, 3.0f), 0.0f), 6.0f);
  return __fmul_rn(t, __fmul_rn(gate, 1.66666672e-1f));
}

// Of all values, times `factor`. In a loop, each time on the first of them, for there are many copies of this code in a kernel.
template <int kVec>
__device__ __forceinline__ void activate(float (&t)[kVec], Activation activation, float factor) {
#pragma unroll 1
  for (int i = 0; i < kVec; ++i) {
    const float done = activation == Activation::kSilu ? silu(t[0]) : hardswish(t[0]);
#pragma unroll
    for (int j = 0; j + 1 < kVec; ++j) t[j] = t[j + 1];
    t[kVec - 1] = __fmul_rn(done, factor);
  }
}

}  // namespace cnncomp::cuda
