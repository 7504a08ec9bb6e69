// Activations that are no clamp, affine maps of channels, and copies, of fp32 images.
#pragma once

#include <cstdint>

namespace cnncomp {

enum class Activation : int { sigmoid, silu, hardsigmoid, hardswish };
constexpr int kActivations = 4;

struct ActivateArgs {
  const float* x;  // (rows, length)
  int64_t rows, length;
  float* out;  // (rows, length); may be x
  int num_threads;
  int64_t x_pitch = 0, out_pitch = 0;  // floats from a row to the next; 0: no gap
};

// out = activation(x), within 5e-7 of its size; sigmoids and SiLUs of what is below -87 within 1e-35. Throws
// std::invalid_argument for another activation, and for rows that overlap.
void activate(const ActivateArgs& args, Activation activation);

// Of each row: out = clamp(x * scale + shift, lo, hi).
struct AffineRows {
  const float* scale;  // (channels)
  const float* shift;  // (channels), or null
  int64_t channels;    // row i is of channel i % channels
  float lo, hi;
};

void affine_rows(const ActivateArgs& args, const AffineRows& affine);

// out = x
void copy_rows(const ActivateArgs& args);

// Rows of `length` bytes to rows that begin `out_pitch` bytes apart.
void copy_byte_rows(const uint8_t* x, int64_t rows, int64_t length, uint8_t* out, int64_t out_pitch, int num_threads);

}  // namespace cnncomp
