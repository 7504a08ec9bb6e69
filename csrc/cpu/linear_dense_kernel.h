// What the driver of the dense linear layer and its kernels, compiled once per instruction set, say to each other.
#pragma once

#include <cstdint>

namespace cnncomp {

// Rows of x that one pass over a row of the weight serves.
constexpr int kLinearRows = 4;

// sums[i] = the dot product of row i of x, `stride` floats from the one before, with w; `rows` <= kLinearRows.
using DotKernel = void (*)(const float* x, int64_t stride, int rows, const float* w, int64_t length, float* sums);

extern const DotKernel kDotBaseline;
extern const DotKernel kDotAvx2;    // x86-64 only
extern const DotKernel kDotAvx512;  // x86-64 only

}  // namespace cnncomp
