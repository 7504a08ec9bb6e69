// The depthwise convolution of one plane, one source for every instruction set. Plain arrays only, for the reasons that
// conv2d_sparse_tile.h gives.
//
// Nothing is copied or padded: lanes outside the image are masked out of the loads. A vector of inputs serves all the output
// rows in hand that it reaches.
#pragma once

#include "conv2d_depthwise_kernel.h"
#include "strided_load.h"

namespace cnncomp {
namespace {

// Lanes [first, last) of a vector that starts at column `at` of a row of `w` lie inside the image; `stride` apart.
struct Inside {
  int first, last;
  Inside(int64_t at, int64_t w, int64_t stride, int lanes) {
    const int64_t begin = at < 0 ? (-at + stride - 1) / stride : 0;
    const int64_t end = at < w ? (w - at + stride - 1) / stride : 0;
    first = static_cast<int>(begin < lanes ? begin : lanes);
    last = static_cast<int>(end < lanes ? end : lanes);
  }
};

// out[0..lanes) = clamp(v + residual), as far as the row goes.
template <class V>
void put(const DepthwisePlane& a, typename V::Vec v, int64_t row, int64_t column) {
  const int64_t at = row * a.q + column, left = a.q - column;
  const typename V::Vec lo = V::broadcast(a.lo), hi = V::broadcast(a.hi);
  if (left >= V::kLanes) {
    if (a.residual != nullptr) v = V::add(v, V::load(a.residual + at));
    V::store(a.out + at, V::clamp(v, lo, hi));
    return;
  }
  const int n = static_cast<int>(left);
  if (a.residual != nullptr) v = V::add(v, V::load_between(a.residual + at, 0, n));
  V::store_first(a.out + at, V::clamp(v, lo, hi), n);
}

// The inputs that tap s of a vector of outputs meets in a row: STRIDE loads, whole or masked.
template <class V, int S, int STRIDE, bool INNER>
struct Taps {
  typename V::Mask mask[S][STRIDE];

  explicit Taps(const DepthwisePlane& a, int64_t left) {
    if constexpr (!INNER) {
      for (int s = 0; s < S; s++) {
        const Inside in(left + s, a.w, STRIDE, V::kLanes);
        // Of the last pair only the first is sure to be there.
        const int low = STRIDE * in.first, high = STRIDE * in.last - (STRIDE - 1);
        for (int i = 0; i < STRIDE; i++) mask[s][i] = V::between(low - i * V::kLanes, high - i * V::kLanes);
      }
    }
  }
  typename V::Vec load(const float* x, int s) const {
    if constexpr (STRIDE == 1) return part(x, s, 0);
    else return V::even(part(x, s, 0), part(x, s, 1));
  }

 private:
  typename V::Vec part(const float* x, int s, int i) const {
    const float* const p = x + s + i * V::kLanes;
    if constexpr (INNER) return V::load(p);
    else return V::load_masked(p, mask[s][i]);
  }
};

// A vector of columns of ROWS output rows, for an R x S kernel without dilation.
template <class V, int R, int S, int STRIDE, int ROWS, class Taps>
inline __attribute__((always_inline)) void square(const DepthwisePlane& a, const typename V::Vec (&weight)[R * S],
                                                  const Taps& taps, int64_t row, int64_t column) {
  const int64_t top = row * STRIDE - a.pad_h, left = column * STRIDE - a.pad_w;
  typename V::Vec sum[ROWS];
#pragma GCC unroll 4
  for (int b = 0; b < ROWS; b++) sum[b] = V::broadcast(a.bias);
#pragma GCC unroll 16
  for (int i = 0; i < (ROWS - 1) * STRIDE + R; i++) {
    if (top + i < 0 || top + i >= a.h) continue;
    const float* const x = a.x + (top + i) * a.w + left;
#pragma GCC unroll 8
    for (int s = 0; s < S; s++) {
      const typename V::Vec v = taps.load(x, s);
#pragma GCC unroll 4
      for (int b = 0; b < ROWS; b++) {
        const int r = i - b * STRIDE;
        if (r >= 0 && r < R) sum[b] = V::fma(weight[r * S + s], v, sum[b]);
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < ROWS; b++) put<V>(a, sum[b], row + b, column);
}

// A vector of columns of all output rows. INNER: all of its inputs, and what is loaded with them, lie inside their rows.
template <class V, int R, int S, int STRIDE, bool INNER>
void square_columns(const DepthwisePlane& a, const typename V::Vec (&weight)[R * S], int64_t column) {
  const Taps<V, S, STRIDE, INNER> taps(a, column * STRIDE - a.pad_w);
  int64_t row = 0;
  for (; row + 4 <= a.p; row += 4) square<V, R, S, STRIDE, 4>(a, weight, taps, row, column);
  for (; row + 2 <= a.p; row += 2) square<V, R, S, STRIDE, 2>(a, weight, taps, row, column);
  if (row < a.p) square<V, R, S, STRIDE, 1>(a, weight, taps, row, column);
}

template <class V, int R, int S, int STRIDE>
void square_plane(const DepthwisePlane& a) {
  typename V::Vec weight[R * S];
  for (int i = 0; i < R * S; i++) weight[i] = V::broadcast(a.weight[i]);
  for (int64_t column = 0; column < a.q; column += V::kLanes) {
    const int64_t left = column * STRIDE - a.pad_w;
    if (left >= 0 && left + S - 1 + STRIDE * V::kLanes <= a.w) {
      square_columns<V, R, S, STRIDE, true>(a, weight, column);
    } else {
      square_columns<V, R, S, STRIDE, false>(a, weight, column);
    }
  }
}

template <class V>
void any_plane(const DepthwisePlane& a) {
  for (int64_t row = 0; row < a.p; row++) {
    for (int64_t column = 0; column < a.q; column += V::kLanes) {
      typename V::Vec sum = V::broadcast(a.bias);
      for (int64_t r = 0; r < a.r; r++) {
        const int64_t y = row * a.stride_h - a.pad_h + r * a.dil_h;
        if (y < 0 || y >= a.h) continue;
        for (int64_t s = 0; s < a.s; s++) {
          const int64_t left = column * a.stride_w - a.pad_w + s * a.dil_w;
          const Inside in(left, a.w, a.stride_w, V::kLanes);
          if (in.first >= in.last) continue;
          const float* const x = a.x + y * a.w + left;
          const typename V::Vec v = a.stride_w == 1   ? V::load_between(x, in.first, in.last)
                                    : a.stride_w == 2 ? every_second<V>(x, in.first, in.last)
                                                      : every_nth<V>(x, in.first, in.last, a.stride_w);
          sum = V::fma(V::broadcast(a.weight[r * a.s + s]), v, sum);
        }
      }
      put<V>(a, sum, row, column);
    }
  }
}

template <class V>
void depthwise_plane(const DepthwisePlane& a) {
  const int64_t size = a.r == a.s && a.dil_h * a.dil_w == 1 && a.stride_h == a.stride_w ? a.r : 0;
  if (size == 3 && a.stride_w == 1) return square_plane<V, 3, 3, 1>(a);
  if (size == 3 && a.stride_w == 2) return square_plane<V, 3, 3, 2>(a);
  if (size == 5 && a.stride_w == 1) return square_plane<V, 5, 5, 1>(a);
  if (size == 5 && a.stride_w == 2) return square_plane<V, 5, 5, 2>(a);
  any_plane<V>(a);
}

}  // namespace
}  // namespace cnncomp
