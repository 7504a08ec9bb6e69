// Floats to 8-bit NHWC.
#pragma once

#include <cstdint>

namespace cnncomp {

struct QuantizeArgs {
  const float* x;  // (n, c, h, w), or (n, h, w, c) if channels_last
  int64_t n, c, h, w;
  bool channels_last;
  uint8_t* out;  // (n, h, w, c), int8 if out_signed
  bool out_signed;
  float inv_scale;
  int num_threads;
};

// out = round_half_to_even(clamp(x * inv_scale)), to 0..255 or -128..127; NaN gives the lowest.
void quantize(const QuantizeArgs& args);

}  // namespace cnncomp
