// What the driver of the fp32 pools and its kernels, compiled once per instruction set, say to each other.
#pragma once

#include <cstdint>

namespace cnncomp {

// One output row of one channel.
struct MaxPoolRow {
  const float* const* rows;  // of the input, those that the window meets; at least one
  int64_t num_rows, w, s, stride, pad, dilation;
  float* line;  // -infinity on [0, pad) and from pad + w on, as far as the windows reach and two vectors beyond
  float* out;
  int64_t q;
};

struct PoolKernels {
  void (*max_row)(const MaxPoolRow&);
  float (*sum)(const float* x, int64_t length);
  // out[i] = scale * the sum over `count` rows, `stride` floats apart.
  void (*sum_rows)(const float* x, int64_t count, int64_t stride, int64_t length, float scale, float* out);
};

constexpr int64_t kPoolSlack = 32;  // floats: two of the widest vectors

extern const PoolKernels kPoolBaseline;
extern const PoolKernels kPoolAvx2;    // x86-64 only
extern const PoolKernels kPoolAvx512;  // x86-64 only

}  // namespace cnncomp
