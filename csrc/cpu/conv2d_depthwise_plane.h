// The depthwise convolution of some planes, one source for every instruction set. Plain arrays only, for the reasons that
// conv2d_sparse_tile.h gives.
//
// Nothing is copied or padded: lanes outside the image are masked out of the loads, by masks made once for all planes. A vector
// of inputs serves all the output rows in hand that it reaches.
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

// One channel.
struct Plane : DepthwisePlanes {
  float first;  // what sums begin with
  // Of these planes: before it may be written what is written over later, or lies in a gap behind a channel, which may hold
  // anything. Null where a residual may lie there.
  const float* end;
  Plane(const DepthwisePlanes& a, int64_t i)
      : DepthwisePlanes(a),
        first(a.bias != nullptr ? a.bias[i] : 0.0f),
        end(a.residual != nullptr ? nullptr : a.out + (a.planes - 1) * a.out_pitch + a.p * a.q) {
    x += i * a.x_pitch;
    weight += i * a.r * a.s;
    if (residual != nullptr) residual += i * a.out_pitch;
    out += i * a.out_pitch;
  }
};

// out[0..lanes) = clamp(v + residual), as far as the row goes; or, with SPILL, farther: some processors take long to store a part
// of a vector. For callers that write the first columns of a row after the last ones of the rows before it.
template <class V, bool SPILL>
inline __attribute__((always_inline)) void put(const Plane& a, typename V::Vec v, int64_t row, int64_t column) {
  const int64_t at = row * a.q + column, left = a.q - column;
  const typename V::Vec lo = V::broadcast(a.lo), hi = V::broadcast(a.hi);
  if (left >= V::kLanes || (SPILL && a.out + at + V::kLanes <= a.end)) {
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

  Taps(const DepthwisePlanes& a, int64_t left) {
    if constexpr (!INNER) {
      for (int s = 0; s < S; s++) {
        const Inside in(left + s, a.w, STRIDE, V::kLanes);
        // Of the last pair only the first is sure to be there.
        const int low = STRIDE * in.first, high = STRIDE * in.last - (STRIDE - 1);
        for (int i = 0; i < STRIDE; i++) mask[s][i] = V::between(low - i * V::kLanes, high - i * V::kLanes);
      }
    }
  }
  inline __attribute__((always_inline)) typename V::Vec load(const float* x, int s) const {
    if constexpr (STRIDE == 1) return part(x, s, 0);
    else return V::even(part(x, s, 0), part(x, s, 1));
  }

 private:
  inline __attribute__((always_inline)) typename V::Vec part(const float* x, int s, int i) const {
    const float* const p = x + s + i * V::kLanes;
    if constexpr (INNER) return V::load(p);
    else return V::load_masked(p, mask[s][i]);
  }
};

// rows<ROWS>(row) for all output rows, up to four at a time.
template <class Rows>
inline __attribute__((always_inline)) void by_rows(int64_t p, Rows rows) {
  int64_t row = 0;
  for (; row + 4 <= p; row += 4) rows.template operator()<4>(row);
  for (; row + 2 <= p; row += 2) rows.template operator()<2>(row);
  if (row < p) rows.template operator()<1>(row);
}

// A vector of columns of ROWS output rows, for an R x S kernel without dilation.
template <class V, int R, int S, int STRIDE, int ROWS, class Taps>
inline __attribute__((always_inline)) void square(const Plane& a, const typename V::Vec (&weight)[R * S], const Taps& taps,
                                                  int64_t row, int64_t column) {
  const int64_t top = row * STRIDE - a.pad_h, left = column * STRIDE - a.pad_w;
  typename V::Vec sum[ROWS];
#pragma GCC unroll 4
  for (int b = 0; b < ROWS; b++) sum[b] = V::broadcast(a.first);
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
  for (int b = 0; b < ROWS; b++) put<V, true>(a, sum[b], row + b, column);
}

// A vector of columns of all output rows, plane by plane. INNER: all of its inputs, and what is loaded with them, lie inside
// their rows.
template <class V, int R, int S, int STRIDE, bool INNER>
void square_columns(const DepthwisePlanes& a, int64_t column) {
  const Taps<V, S, STRIDE, INNER> taps(a, column * STRIDE - a.pad_w);
  for (int64_t i = 0; i < a.planes; i++) {
    const Plane plane(a, i);
    typename V::Vec weight[R * S];
    for (int j = 0; j < R * S; j++) weight[j] = V::broadcast(plane.weight[j]);
    by_rows(a.p, [&]<int ROWS>(int64_t row) __attribute__((always_inline)) {
      square<V, R, S, STRIDE, ROWS>(plane, weight, taps, row, column);
    });
  }
}

template <class V, int R, int S, int STRIDE>
void square_planes(const DepthwisePlanes& a) {
  for (int64_t column = (a.q - 1) / V::kLanes * V::kLanes; column >= 0; column -= V::kLanes) {
    const int64_t left = column * STRIDE - a.pad_w;
    if (left >= 0 && left + S - 1 + STRIDE * V::kLanes <= a.w) {
      square_columns<V, R, S, STRIDE, true>(a, column);
    } else {
      square_columns<V, R, S, STRIDE, false>(a, column);
    }
  }
}

// ROWS output rows of a 3 x 3 kernel padded by one column: each input is loaded once, and shifted by a lane for its other taps.
template <class V, int STRIDE, int ROWS>
inline __attribute__((always_inline)) void shifted(const Plane& a, const typename V::Vec (&weight)[9], int64_t row) {
  constexpr int kInputs = (ROWS - 1) * STRIDE + 3, kLanes = V::kLanes;
  const float* x[kInputs];
  int64_t width[kInputs];  // 0 above and below the image
  typename V::Vec before[kInputs], here[kInputs];
#pragma GCC unroll 16
  for (int i = 0; i < kInputs; i++) {
    const int64_t y = row * STRIDE - a.pad_h + i;
    width[i] = y < 0 || y >= a.h ? 0 : a.w;
    x[i] = a.x + (width[i] == 0 ? 0 : y * a.w);
    before[i] = V::broadcast(0.0f);
    if constexpr (STRIDE == 1) here[i] = load_inside<V>(x[i], 0, width[i]);
  }
  for (int64_t column = 0; column < a.q; column += kLanes) {
    typename V::Vec sum[ROWS];
#pragma GCC unroll 4
    for (int b = 0; b < ROWS; b++) sum[b] = V::broadcast(a.first);
#pragma GCC unroll 16
    for (int i = 0; i < kInputs; i++) {
      typename V::Vec tap[3];
      if constexpr (STRIDE == 1) {
        const typename V::Vec next = load_inside<V>(x[i], column + kLanes, width[i]);
        tap[0] = V::template from<kLanes - 1>(before[i], here[i]);
        tap[1] = here[i];
        tap[2] = V::template from<1>(here[i], next);
        before[i] = here[i];
        here[i] = next;
      } else {
        const auto low = load_inside<V>(x[i], 2 * column, width[i]), high = load_inside<V>(x[i], 2 * column + kLanes, width[i]);
        tap[1] = V::even(low, high);
        tap[2] = V::odd(low, high);
        tap[0] = V::template from<kLanes - 1>(before[i], tap[2]);
        before[i] = tap[2];
      }
#pragma GCC unroll 4
      for (int b = 0; b < ROWS; b++) {
        const int r = i - b * STRIDE;
        if (r < 0 || r >= 3) continue;
#pragma GCC unroll 4
        for (int s = 0; s < 3; s++) sum[b] = V::fma(weight[r * 3 + s], tap[s], sum[b]);
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < ROWS; b++) put<V, false>(a, sum[b], row + b, column);
  }
}

template <class V, int STRIDE>
void shifted_planes(const DepthwisePlanes& a) {
  for (int64_t i = 0; i < a.planes; i++) {
    const Plane plane(a, i);
    typename V::Vec weight[9];
    for (int j = 0; j < 9; j++) weight[j] = V::broadcast(plane.weight[j]);
    by_rows(a.p, [&]<int ROWS>(int64_t row) __attribute__((always_inline)) { shifted<V, STRIDE, ROWS>(plane, weight, row); });
  }
}

template <class V>
void any_plane(const Plane& a) {
  for (int64_t row = 0; row < a.p; row++) {
    for (int64_t column = 0; column < a.q; column += V::kLanes) {
      typename V::Vec sum = V::broadcast(a.first);
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
      put<V, true>(a, sum, row, column);
    }
  }
}

template <class V>
void any_planes(const DepthwisePlanes& a) {
  for (int64_t i = 0; i < a.planes; i++) any_plane<V>(Plane(a, i));
}

template <class V, int SIZE>
void square_planes_by_stride(const DepthwisePlanes& a) {
  if constexpr (V::kShifts && SIZE == 3) {
    const bool wide = a.w > 2 * V::kLanes;  // one vector or two are not worth the shifts
    if (a.pad_w == 1 && wide) return a.stride_w == 1 ? shifted_planes<V, 1>(a) : shifted_planes<V, 2>(a);
  }
  a.stride_w == 1 ? square_planes<V, SIZE, SIZE, 1>(a) : square_planes<V, SIZE, SIZE, 2>(a);
}

// Half: a vector for rows that are no longer than it, or V.
template <class V, class Half = V>
void depthwise_planes(const DepthwisePlanes& a) {
  const int64_t size = a.r == a.s && a.dil_h * a.dil_w == 1 && a.stride_h == a.stride_w && a.stride_w <= 2 ? a.r : 0;
  const bool half = a.q <= Half::kLanes;
  if (size == 3) return half ? square_planes_by_stride<Half, 3>(a) : square_planes_by_stride<V, 3>(a);
  if (size == 5) return half ? square_planes_by_stride<Half, 5>(a) : square_planes_by_stride<V, 5>(a);
  any_planes<V>(a);
}

}  // namespace
}  // namespace cnncomp
