// Passes over activations beside the products, as the host sees them. Plain C++, like launch.h.
#pragma once

#include "cuda/launch.h"

namespace cnncomp::cuda {

// Max-pool of bytes, to p x q pixels, and mean over all pixels of float32, of NHWC images: sizes, x and epilogue.out are looked at,
// of Conv2d. More pixels than its p() and q() lie at the end, and their windows partly outside.
Launch plan_max_pool2d_int8(const Conv2d& pool, int p, int q);
Launch plan_mean_pool2d(const Conv2d& pool);

// Floats (n, pixels, c), or planes (n, c, pixels), to 8-bit (n, pixels, c).
struct Quantize {
  const void* x;
  void* out;
  DType x_dtype, out_dtype;
  int32_t n, pixels, c;
  bool channels_last;
  float inv_scale;
};
Launch plan_quantize(const Quantize& quantize);

// shift[k] times the sum of the inputs under each output's window, float32 like the output: epilogue.constants are the shifts,
// epilogue.out the result.
Launch plan_mean_shift_int8(const Conv2d& conv);
Launch plan_mean_shift_depthwise_int8(const Conv2d& conv);  // one input channel a group
void set_mean_shift(Launch& launch, const Conv2d& conv, int64_t blocks, int threads);

}  // namespace cnncomp::cuda
