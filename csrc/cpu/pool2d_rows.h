// The rows of fp32 pools, one source for every instruction set. Plain arrays only, for the reasons that
// conv2d_sparse_tile.h gives.
#pragma once

#include "pool2d_kernel.h"
#include "strided_load.h"
#include "sum_of_lanes.h"

namespace cnncomp {
namespace {

// 3 x 3 windows, 2 apart, padded by one column on the left and none on the right: nothing goes through memory.
template <class V>
void max_row_by_shifts(const MaxPoolRow& a) {
  const auto greatest_of_columns = [&](int64_t at) {
    const int64_t left = a.w - at, from = left > 0 ? at : 0;
    const int n = static_cast<int>(left < 0 ? 0 : left < V::kLanes ? left : V::kLanes);
    typename V::Vec v = V::load_between(a.rows[0] + from, 0, n);
    for (int64_t r = 1; r < a.num_rows; r++) v = V::max(v, V::load_between(a.rows[r] + from, 0, n));
    return v;
  };
  typename V::Vec before = V::broadcast(-__builtin_inff());
  for (int64_t i = 0; i < a.q; i += V::kLanes) {
    const typename V::Vec low = greatest_of_columns(2 * i), high = greatest_of_columns(2 * i + V::kLanes);
    const typename V::Vec odd = V::odd(low, high), shifted = V::template from<V::kLanes - 1>(before, odd);
    const typename V::Vec v = V::max(V::max(shifted, V::even(low, high)), odd);
    before = odd;
    if (a.q - i >= V::kLanes) V::store(a.out + i, v);
    else V::store_first(a.out + i, v, static_cast<int>(a.q - i));
  }
}

// First the greatest of each column, then of each window of columns: every input is loaded once.
template <class V>
void max_row(const MaxPoolRow& a) {
  if constexpr (V::kShifts) {
    if (a.s == 3 && a.stride == 2 && a.dilation == 1 && a.pad == 1 && 2 * a.q == a.w) return max_row_by_shifts<V>(a);
  }
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
  constexpr int kSets = 4;  // additions in flight
  typename V::Vec v[kSets];
  for (int s = 0; s < kSets; s++) v[s] = V::broadcast(0.0f);
  int64_t i = 0;
  for (; i + kSets * V::kLanes <= length; i += kSets * V::kLanes) {
#pragma GCC unroll 4
    for (int s = 0; s < kSets; s++) v[s] = V::add(v[s], V::load(x + i + s * V::kLanes));
  }
  for (; i + V::kLanes <= length; i += V::kLanes) v[0] = V::add(v[0], V::load(x + i));
  if (i < length) v[1] = V::add(v[1], V::load_between(x + i, 0, static_cast<int>(length - i)));
  return sum_of_lanes<V>(V::add(V::add(v[0], v[1]), V::add(v[2], v[3])));
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
