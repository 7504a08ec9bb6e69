// Max-pooling of 8-bit NHWC images.
#pragma once

#include <cstdint>

namespace cnncomp {

struct MaxPool2dInt8Args {
  const uint8_t* x;  // (n, h, w, c), int8 if x_signed
  bool x_signed;
  int64_t n, h, w, c, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  uint8_t* out;  // (n, p, q, c); a window that lies in the padding altogether gives the lowest value
  int num_threads;
  bool ceil_mode;
};

void max_pool2d_int8(const MaxPool2dInt8Args& args);

}  // namespace cnncomp
