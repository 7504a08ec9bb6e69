// Pooling of fp32 images.
#pragma once

#include <cstdint>

namespace cnncomp {

struct MaxPool2dArgs {
  const float* x;  // (n, c, h, w)
  int64_t n, c, h, w, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  float* out;  // (n, c, p, q)
  int num_threads;
  int64_t x_pitch = 0, out_pitch = 0;  // floats from a channel to the next; 0: no gap
  bool ceil_mode = false;              // windows may reach beyond the padding, if they begin before it
};

// The greatest value of each window, NaN if it holds one; -infinity for a window outside the image. Throws
// std::invalid_argument for sizes that give no window.
void max_pool2d(const MaxPool2dArgs& args);

struct MeanPool2dArgs {
  const float* x;  // (n, c, pixels), or (n, pixels, c)
  int64_t n, c, pixels;
  bool channels_last;
  float* out;  // (n, c)
  int num_threads;
  int64_t x_pitch = 0;  // of (n, c, pixels): floats from a channel to the next; 0: no gap
};

// The mean of each channel of each image.
void mean_pool2d(const MeanPool2dArgs& args);

}  // namespace cnncomp
