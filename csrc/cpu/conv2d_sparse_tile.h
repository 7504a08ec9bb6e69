// The micro-kernels of the sparse convolution, one source for every instruction set.
//
// Each tap of the convolution is one flat offset into a copy of the input made for the purpose, so a non-zero weight is
// one broadcast and T multiply-adds whose other operand is in memory.
//
// Only plain arrays here: this file is compiled with flags of one instruction set, and a function of the standard library
// instantiated in it could be the copy that the linker keeps for every machine. For the same reason all is in an unnamed
// namespace.
#pragma once

#include "conv2d_sparse_kernel.h"

namespace cnncomp {
namespace {

template <class V, int T>
struct Accumulators {
  typename V::Vec v[T];

  void fill(float value) {
    const typename V::Vec w = V::broadcast(value);
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) v[t] = w;
  }
  void load(const float* p) {
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) v[t] = V::load(p + t * V::kLanes);
  }
  void store(float* p) const {
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) V::store(p + t * V::kLanes, v[t]);
  }
  void add(const Accumulators& other) {
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) v[t] = V::add(v[t], other.v[t]);
  }
  void add(const float* p) {
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) v[t] = V::add(v[t], V::load(p + t * V::kLanes));
  }
  void clamp(float lo, float hi) {
    const typename V::Vec vlo = V::broadcast(lo), vhi = V::broadcast(hi);
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) v[t] = V::clamp(v[t], vlo, vhi);
  }
  void fma(float weight, const float* x) {
    const typename V::Vec w = V::broadcast(weight);
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) v[t] = V::fma(w, V::load(x + t * V::kLanes), v[t]);
  }
};

// acc += the non-zeros [begin, end). A short tile has too few sums to fill the latency of the multiply-add: there, every
// second or fourth non-zero goes to a set of sums of its own.
template <class V, int T>
inline __attribute__((always_inline)) void add_row(const SparseTile& a, int32_t begin, int32_t end,
                                                   Accumulators<V, T>& acc) {
  constexpr int kSets = T >= 8 ? 1 : T >= 4 ? 2 : 4;
  const char* const x = reinterpret_cast<const char*>(a.x);
  const float* const values = a.values;
  const uint16_t* const index = a.index;
  const int32_t* const offset = a.offset;
  int32_t i = begin;
  if constexpr (kSets > 1) {
    Accumulators<V, T> more[kSets - 1];
#pragma GCC unroll 4
    for (int s = 0; s + 1 < kSets; s++) more[s].fill(0.0f);
    for (; i + kSets <= end; i += kSets) {
      acc.fma(values[i], reinterpret_cast<const float*>(x + offset[index[i]]));
#pragma GCC unroll 4
      for (int s = 1; s < kSets; s++) more[s - 1].fma(values[i + s], reinterpret_cast<const float*>(x + offset[index[i + s]]));
    }
#pragma GCC unroll 4
    for (int s = 0; s + 1 < kSets; s++) acc.add(more[s]);
  }
  for (; i < end; i++) acc.fma(values[i], reinterpret_cast<const float*>(x + offset[index[i]]));
}

// out = clamp(sum + residual), for `length` floats.
template <class V>
void finish(float* out, const float* sum, const float* residual, int64_t length, float lo, float hi) {
  const typename V::Vec vlo = V::broadcast(lo), vhi = V::broadcast(hi);
  int64_t i = 0;
  for (; i + V::kLanes <= length; i += V::kLanes) {
    typename V::Vec y = V::load(sum + i);
    if (residual != nullptr) y = V::add(y, V::load(residual + i));
    V::store(out + i, V::clamp(y, vlo, vhi));
  }
  if (i == length) return;
  const int rest = static_cast<int>(length - i);
  typename V::Vec y = V::load_first(sum + i, rest);
  if (residual != nullptr) y = V::add(y, V::load_first(residual + i, rest));
  V::store_first(out + i, V::clamp(y, vlo, vhi), rest);
}

template <class V, int T>
void tile(const SparseTile& a) {
  constexpr int kTile = T * V::kLanes;
  alignas(64) float last[kTile];
  for (int64_t k = a.k_begin; k < a.k_end; k++) {
    const int64_t partial = (k - a.k_begin) * kTile;
    Accumulators<V, T> acc;
    if (a.first_block) {
      acc.fill(a.bias != nullptr ? a.bias[k] : 0.0f);
    } else {
      acc.load(a.partial + partial);
    }
    add_row(a, a.row_ptr[k], a.row_ptr[k + 1], acc);
    if (!a.last_block) {
      acc.store(a.partial + partial);
      continue;
    }
    if (a.num_segments == 1 && a.segments[0].length == kTile) {
      const int64_t at = a.segments[0].out_begin + k * a.out_stride_k;
      if (a.residual != nullptr) acc.add(a.residual + at);
      acc.clamp(a.lo, a.hi);
      acc.store(a.out + at);
      continue;
    }
    acc.store(last);
    for (int64_t i = 0; i < a.num_segments; i++) {
      const SparseSegment& s = a.segments[i];
      const int64_t at = s.out_begin + k * a.out_stride_k;
      finish<V>(a.out + at, last + s.tile_begin, a.residual != nullptr ? a.residual + at : nullptr, s.length, a.lo, a.hi);
    }
  }
}

// The three below may write up to a vector past the end, which is written again afterwards; they never read past it.

template <class V>
void zero(float* dst, int64_t length) {
  if (length <= 0) return;
  const typename V::Vec z = V::broadcast(0.0f);
  V::store(dst, z);  // mostly all there is to do: apart, or the compiler calls memset for it
  for (int64_t i = V::kLanes; i < length; i += V::kLanes) V::store(dst + i, z);
}

// dst[i] = src[i * stride], 0 <= i < length.
template <class V>
void copy(float* dst, const float* src, int64_t length, int64_t stride) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + V::kLanes <= length; i += V::kLanes) V::store(dst + i, V::load(src + i));
    if (i < length) V::store(dst + i, V::load_first(src + i, static_cast<int>(length - i)));
    return;
  }
  if (stride == 2) {  // one element more must follow: of a pair, only the first is sure to be there
    for (; i + V::kLanes < length; i += V::kLanes) {
      V::store(dst + i, V::even(V::load(src + 2 * i), V::load(src + 2 * i + V::kLanes)));
    }
  }
  for (; i < length; i++) dst[i] = src[i * stride];
}

template <class V>
void pack(const SparsePack& a) {
  float* dst = a.dst;
  for (int64_t c = 0; c < a.channels; c++) {
    const float* x = a.x + c * a.h * a.w;
    for (int64_t plane = 0; plane < a.row_planes * a.column_planes; plane++) {
      const SparseRun* run = a.runs + plane % a.column_planes;
      const int64_t row_start = a.row_start[plane / a.column_planes];
      float* const end = dst + a.plane_length;
      for (int64_t i = 0; i < a.num_runs; i++, run += a.column_planes) {
        const int64_t row = row_start + run->row * a.stride_h;
        if (row < 0 || row >= a.h) {
          zero<V>(dst, run->length);
        } else {
          zero<V>(dst, run->first);
          copy<V>(dst + run->first, x + run->image + row * a.w + run->column, run->last - run->first, a.stride_w);
          zero<V>(dst + run->last, run->length - run->last);
        }
        dst += run->length;
      }
      zero<V>(dst, end - dst);  // only for lanes that are thrown away: not to meet stale denormals
      dst = end;
    }
  }
}

template <class V>
constexpr SparseKernels sparse_kernels_of() {
  return {V::kLanes,
          {tile<V, 1>, tile<V, 2>, tile<V, 3>, tile<V, 4>, tile<V, 5>, tile<V, 6>, tile<V, 7>, tile<V, 8>, tile<V, 9>,
           tile<V, 10>, tile<V, 11>, tile<V, 12>, tile<V, 13>, tile<V, 14>},
          pack<V>};
}

}  // namespace
}  // namespace cnncomp
