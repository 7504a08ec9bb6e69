// Dot products of a few vectors with one, one source for every instruction set. Plain arrays only, for the reasons that
// conv2d_sparse_tile.h gives.
#pragma once

#include "linear_dense_kernel.h"
#include "sum_of_lanes.h"

namespace cnncomp {
namespace {

// Enough sums at once to fill the latency of the multiply-add: kSets for each of ROWS rows.
template <class V, int ROWS>
void dot_rows(const float* x, int64_t stride, const float* w, int64_t length, float* sums) {
  constexpr int kSets = ROWS <= 2 ? 8 / ROWS : 2;
  constexpr int64_t kAhead = 1024;  // floats: the next rows of the weight follow without a gap
  typename V::Vec sum[ROWS][kSets];
  for (int r = 0; r < ROWS; r++) {
    for (int s = 0; s < kSets; s++) sum[r][s] = V::broadcast(0.0f);
  }
  int64_t i = 0;
  for (; i + kSets * V::kLanes <= length; i += kSets * V::kLanes) {
#pragma GCC unroll 8
    for (int s = 0; s < kSets; s++) {
      const int64_t at = i + s * V::kLanes;
      if (s * V::kLanes % 16 == 0) __builtin_prefetch(w + at + kAhead);
      const typename V::Vec v = V::load(w + at);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) sum[r][s] = V::fma(v, V::load(x + r * stride + at), sum[r][s]);
    }
  }
  for (; i < length; i += V::kLanes) {
    const int left = static_cast<int>(length - i < V::kLanes ? length - i : V::kLanes);
    const typename V::Vec v = V::load_between(w + i, 0, left);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) sum[r][0] = V::fma(v, V::load_between(x + r * stride + i, 0, left), sum[r][0]);
  }
  for (int r = 0; r < ROWS; r++) {
    for (int s = 1; s < kSets; s++) sum[r][0] = V::add(sum[r][0], sum[r][s]);
    sums[r] = sum_of_lanes<V>(sum[r][0]);
  }
}

template <class V>
void dot(const float* x, int64_t stride, int rows, const float* w, int64_t length, float* sums) {
  static_assert(kLinearRows == 4);
  switch (rows) {
    case 1: return dot_rows<V, 1>(x, stride, w, length, sums);
    case 2: return dot_rows<V, 2>(x, stride, w, length, sums);
    case 3: return dot_rows<V, 3>(x, stride, w, length, sums);
    default: return dot_rows<V, 4>(x, stride, w, length, sums);
  }
}

}  // namespace
}  // namespace cnncomp
