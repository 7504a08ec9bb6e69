// What the driver of the activations and its kernels, compiled once per instruction set, say to each other.
#pragma once

#include <cstdint>

#include "activate.h"

namespace cnncomp {

struct ActivateKernels {
  void (*activate[kActivations])(const float* x, int64_t length, float* out);
  void (*affine)(const float* x, int64_t length, float scale, float shift, float lo, float hi, float* out);
};

extern const ActivateKernels kActivateBaseline;
extern const ActivateKernels kActivateAvx2;    // x86-64 only
extern const ActivateKernels kActivateAvx512;  // x86-64 only

}  // namespace cnncomp
