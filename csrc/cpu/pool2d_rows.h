// The rows of fp32 pools, one source for every instruction set. Plain arrays only, for the reasons that
// conv2d_sparse_tile.h gives.
#pragma once

#include "pool2d_kernel.h"
#include "strided_load.h"
#include "sum_of_lanes.h"

namespace cnncomp {
namespace {

// First the greatest of each column, then of each window of columns: every input is loaded once.
template <class V>
void max_row(const MaxPoolRow& a) {
  float* const line = a.line + a.pad;
  for (int64_t i = 0; i < a.w; i += V::kLanes) {
    const int64_t left = a.w - i;
    if (left >= V::kLanes) {
      typename V::Vec v = V::load(a.rows[0] + i);
      for (int64_t r = 1; r < a.num_rows; r++) v = V::max(v, V::load(a.rows[r] + i));
      V::store(line + i, v);
    } else {
      const int n = static_cast<int>(left);
      typename V::Vec v = V::load_between(a.rows[0] + i, 0, n);
      for (int64_t r = 1; r < a.num_rows; r++) v = V::max(v, V::load_between(a.rows[r] + i, 0, n));
      V::store_first(line + i, v, n);
    }
  }
  for (int64_t i = 0; i < a.q; i += V::kLanes) {
    const auto at = [&](int64_t s) {
      const float* const p = a.line + i * a.stride + s * a.dilation;
      return a.stride == 1   ? V::load(p)
             : a.stride == 2 ? V::even(V::load(p), V::load(p + V::kLanes))
                             : every_nth<V>(p, 0, static_cast<int>(a.q - i), a.stride);
    };
    typename V::Vec v = at(0);
    for (int64_t s = 1; s < a.s; s++) v = V::max(v, at(s));
    if (a.q - i >= V::kLanes) V::store(a.out + i, v);
    else V::store_first(a.out + i, v, static_cast<int>(a.q - i));
  }
}

template <class V>
float sum(const float* x, int64_t length) {
  typename V::Vec v = V::broadcast(0.0f);
  for (int64_t i = 0; i < length; i += V::kLanes) {
    const int64_t left = length - i;
    v = V::add(v, left >= V::kLanes ? V::load(x + i) : V::load_between(x + i, 0, static_cast<int>(left)));
  }
  return sum_of_lanes<V>(v);
}

template <class V>
void sum_rows(const float* x, int64_t count, int64_t stride, int64_t length, float scale, float* out) {
  for (int64_t i = 0; i < length; i += V::kLanes) {
    const int n = static_cast<int>(length - i < V::kLanes ? length - i : V::kLanes);
    typename V::Vec v = V::broadcast(0.0f);
    for (int64_t j = 0; j < count; j++) v = V::add(v, V::load_between(x + j * stride + i, 0, n));
    alignas(64) float lane[V::kLanes];
    V::store(lane, v);
    for (int j = 0; j < n; j++) out[i + j] = lane[j] * scale;
  }
}

template <class V>
constexpr PoolKernels pool_kernels_of() {
  return {max_row<V>, sum<V>, sum_rows<V>};
}

}  // namespace
}  // namespace cnncomp
