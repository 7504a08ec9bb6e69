// The micro-kernels of the sparse convolution, one source for every instruction set.
//
// Each tap of the convolution is one flat offset into a copy of the input made for the purpose, so a non-zero weight is
// one broadcast and T multiply-adds whose other operand is in memory.
//
// Only plain arrays here: this file is compiled with flags of one instruction set, and a function of the standard library
// instantiated in it could be the copy that the linker keeps for every machine. For the same reason all is in an unnamed
// namespace.
#pragma once

#include <utility>

#include "conv2d_sparse_kernel.h"
#include "strided_load.h"

namespace cnncomp {
namespace {

// The sums of one output channel: T vectors, the last of which may be one of fewer lanes.
template <class V, int T, class Last = V>
struct Accumulators {
  static constexpr int kFull = V::kLanes == Last::kLanes ? T : T - 1;
  static constexpr int kFloats = T * V::kLanes;  // that they take in memory
  static constexpr int kUsed = kFull * V::kLanes + (kFull < T ? Last::kLanes : 0);
  typename V::Vec v[kFull > 0 ? kFull : 1];
  typename Last::Vec last;  // if kFull < T

  // f(V or Last, vector, its first float) for each.
  template <class F>
  inline __attribute__((always_inline)) void each(F f) {
#pragma GCC unroll 16
    for (int t = 0; t < kFull; t++) f(V{}, v[t], t * V::kLanes);
    if constexpr (kFull < T) f(Last{}, last, kFull * V::kLanes);
  }
  void fill(float value) {
    each([=](auto lanes, auto& acc, int) { acc = lanes.broadcast(value); });
  }
  void load(const float* p) {
    each([=](auto lanes, auto& acc, int at) { acc = lanes.load(p + at); });
  }
  void store(float* p) {
    each([=](auto lanes, auto& acc, int at) { lanes.store(p + at, acc); });
  }
  void add(const Accumulators& other) {
#pragma GCC unroll 16
    for (int t = 0; t < kFull; t++) v[t] = V::add(v[t], other.v[t]);
    if constexpr (kFull < T) last = Last::add(last, other.last);
  }
  inline __attribute__((always_inline)) void fma(float weight, const float* x) {
    const typename V::Vec w = V::broadcast(weight);
#pragma GCC unroll 16
    for (int t = 0; t < kFull; t++) v[t] = V::fma(w, V::load(x + t * V::kLanes), v[t]);
    if constexpr (kFull < T) last = Last::fma(V::low(w), Last::load(x + kFull * V::kLanes), last);
  }
};

// Where the inputs of a block's non-zeros are: index * step bytes from x, or as far as a list says.
struct Steps {
  const char* x;
  const uint16_t* index;
  int64_t step;
  explicit Steps(const SparseTile& a) : x(reinterpret_cast<const char*>(a.x)), index(a.index), step(a.step) {}
  const float* operator[](int32_t i) const { return reinterpret_cast<const float*>(x + index[i] * step); }
};

struct Offsets {
  const char* x;
  const int32_t* offset;
  explicit Offsets(const SparseTile& a) : x(reinterpret_cast<const char*>(a.x)), offset(a.offset) {}
  const float* operator[](int32_t i) const { return reinterpret_cast<const float*>(x + offset[i]); }
};

// acc += the non-zeros [begin, end). A short tile has too few sums to fill the latency of the multiply-add: there, every
// second or fourth non-zero goes to a set of sums of its own.
template <class V, int T, class Last, class Inputs>
inline __attribute__((always_inline)) void add_row(const float* values, const Inputs& input, int32_t begin, int32_t end,
                                                   Accumulators<V, T, Last>& acc) {
  constexpr int kSets = T >= V::kChains ? 1 : 2 * T >= V::kChains ? 2 : 4;
  int32_t i = begin;
  if constexpr (kSets > 1) {
    Accumulators<V, T, Last> more[kSets - 1];
#pragma GCC unroll 4
    for (int s = 0; s + 1 < kSets; s++) more[s].fill(0.0f);
    for (; i + kSets <= end; i += kSets) {
      acc.fma(values[i], input[i]);
#pragma GCC unroll 4
      for (int s = 1; s < kSets; s++) more[s - 1].fma(values[i + s], input[i + s]);
    }
#pragma GCC unroll 4
    for (int s = 0; s + 1 < kSets; s++) acc.add(more[s]);
  }
  for (; i < end; i++) acc.fma(values[i], input[i]);
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
  typename V::Vec y = V::load_between(sum + i, 0, rest);
  if (residual != nullptr) y = V::add(y, V::load_between(residual + i, 0, rest));
  V::store_first(out + i, V::clamp(y, vlo, vhi), rest);
}

// Calls put(bound), where bound(V or Last, vector) is the vector between a.lo and a.hi. A bound that bounds nothing would take
// its turn in the units that multiply.
template <class Put>
inline __attribute__((always_inline)) void bounded(const SparseTile& a, Put put) {
  if (a.hi < __builtin_inff()) {
    put([lo = a.lo, hi = a.hi](auto v, auto y) __attribute__((always_inline)) { return v.clamp(y, v.broadcast(lo), v.broadcast(hi)); });
  } else if (a.lo > -__builtin_inff()) {
    put([lo = a.lo](auto v, auto y) __attribute__((always_inline)) { return v.at_least(y, v.broadcast(lo)); });
  } else {
    put([](auto, auto y) __attribute__((always_inline)) { return y; });
  }
}

// Writes clamp(acc + residual) to `length` floats of a.out from `at` on: to all lanes but for some of the last vector.
template <class V, int T, class Last>
inline __attribute__((always_inline)) void finish_row(const SparseTile& a, int64_t at, int64_t length, Accumulators<V, T, Last>& acc) {
  constexpr int kUsed = Accumulators<V, T, Last>::kUsed;
  float* const out = a.out + at;
  if (a.residual != nullptr) {
    const float* const residual = a.residual + at;
    acc.each([=](auto lanes, auto& y, int i) __attribute__((always_inline)) {
      const bool whole = i + lanes.kLanes < kUsed || length == kUsed;
      y = lanes.add(y, whole ? lanes.load(residual + i) : lanes.load_between(residual + i, 0, static_cast<int>(length - i)));
    });
  }
  bounded(a, [&](auto bound) __attribute__((always_inline)) {
    acc.each([=](auto lanes, auto y, int i) __attribute__((always_inline)) {
      const bool whole = i + lanes.kLanes < kUsed || length == kUsed;
      if (whole) lanes.store(out + i, bound(lanes, y));
      else lanes.store_first(out + i, bound(lanes, y), static_cast<int>(length - i));
    });
  });
}

// Writes clamp(acc + residual) to output channel k, where a.pieces says.
template <class V, int T, class Last>
inline __attribute__((always_inline)) void finish_pieces(const SparseTile& a, int64_t k, Accumulators<V, T, Last>& acc) {
  float* const out = a.out + k * a.out_stride_k;
  const float* const residual = a.residual != nullptr ? a.residual + k * a.out_stride_k : nullptr;
  const SparsePiece* const pieces = a.pieces;
  bounded(a, [&](auto bound) __attribute__((always_inline)) {
    acc.each([=](auto lanes, auto y, int i) __attribute__((always_inline)) {
      const auto [at, length] = pieces[i / V::kLanes];
      if (length >= lanes.kLanes) {
        if (residual != nullptr) y = lanes.add(y, lanes.load(residual + at));
        lanes.store(out + at, bound(lanes, y));
      } else if (length > 0) {
        const int rest = static_cast<int>(length);
        if (residual != nullptr) y = lanes.add(y, lanes.load_between(residual + at, 0, rest));
        lanes.store_first(out + at, bound(lanes, y), rest);
      }
    });
  });
}

// Brings `floats` floats into the cache: 3 is the first level, 2 the second.
template <int floats, int write, int level = 3>
inline __attribute__((always_inline)) void fetch(const float* p) {
#pragma GCC unroll 16
  for (int i = 0; i < floats; i += 16) __builtin_prefetch(p + i, write, level);
}

// acc = what output channel k starts from.
template <class V, int T, class Last>
inline __attribute__((always_inline)) void begin_row(const SparseTile& a, int64_t k, Accumulators<V, T, Last>& acc) {
  if (a.first_block) {
    acc.fill(a.bias != nullptr ? a.bias[k] : 0.0f);
  } else {
    acc.load(a.partial + (k - a.k_begin) * acc.kFloats);
  }
}

// Puts away the sums of output channel k.
template <class V, int T, class Last>
inline __attribute__((always_inline)) void end_row(const SparseTile& a, int64_t k, Accumulators<V, T, Last>& acc) {
  if (!a.last_block) {
    acc.store(a.partial + (k - a.k_begin) * acc.kFloats);
    return;
  }
  // Not so where a tile begins between two rows, or ends a vector and more behind one.
  if (a.num_segments == 1 && a.segments[0].tile_begin == 0 && a.segments[0].length > acc.kUsed - Last::kLanes) {
    finish_row(a, a.segments[0].out_begin + k * a.out_stride_k, a.segments[0].length, acc);
    return;
  }
  if (a.pieces != nullptr) {
    finish_pieces(a, k, acc);
    return;
  }
  alignas(64) float sums[Accumulators<V, T, Last>::kFloats];
  acc.store(sums);
  for (int64_t i = 0; i < a.num_segments; i++) {
    const SparseSegment& s = a.segments[i];
    const int64_t at = s.out_begin + k * a.out_stride_k;
    finish<V>(a.out + at, sums + s.tile_begin, a.residual != nullptr ? a.residual + at : nullptr, s.length, a.lo, a.hi);
  }
}

template <class V, int T, class Last, class Inputs>
void tile(const SparseTile& given) {
  const SparseTile a = given;  // a copy that nothing can point to: what is stored leaves it as it is
  constexpr int kTile = T * V::kLanes;
  constexpr int64_t kAhead = 4;  // rows: the images of one tile are far apart, and nothing else foresees them
  const Inputs input(a);
  const int64_t fetches = a.next == nullptr ? 0 : (a.next_channels + a.k_end - a.k_begin - 1) / (a.k_end - a.k_begin);
  int64_t fetched = 0;
  for (int64_t k = a.k_begin; k < a.k_end; k++) {
    for (int64_t i = 0; i < fetches && fetched < a.next_channels; i++, fetched++) {
      fetch<kTile, 0, 2>(reinterpret_cast<const float*>(reinterpret_cast<const char*>(a.next) + fetched * a.step));
    }
    Accumulators<V, T, Last> acc;
    begin_row(a, k, acc);
    if (a.last_block && a.num_segments > 1 && a.pieces != nullptr && k + kAhead < a.k_end) {
      const int64_t at = a.pieces[0].out_begin + (k + kAhead) * a.out_stride_k;
      fetch<kTile, 1>(a.out + at);
      if (a.residual != nullptr) fetch<kTile, 0>(a.residual + at);
    }
    add_row(a.values, input, a.row_ptr[k], a.row_ptr[k + 1], acc);
    end_row(a, k, acc);
  }
}

// One vector of a run, for all channels: dst[i] = src[i * stride] for first <= i < last, 0 elsewhere.
template <class V>
void pack_vector(const SparsePack& a, float* dst, const float* src, int first, int last, int keep) {
  const int64_t dst_stride = a.row_planes * a.column_planes * a.plane_length, src_stride = a.pitch;
  const auto put = [&](auto load) {
    for (int64_t c = 0; c < a.channels; c++, dst += dst_stride, src += src_stride) {
      const typename V::Vec v = load(src);
      keep >= V::kLanes ? V::store(dst, v) : V::store_first(dst, v, keep);
    }
  };
  if (first >= last) {
    put([](const float*) { return V::broadcast(0.0f); });
  } else if (a.stride_w == 1) {
    if (first <= 0 && last >= V::kLanes) {
      put([](const float* p) { return V::load(p); });
    } else {
      put([=](const float* p) { return V::load_between(p, first, last); });
    }
  } else if (a.stride_w == 2) {
    put([=](const float* p) { return every_second<V>(p, first, last); });
  } else {
    put([=, stride = a.stride_w](const float* p) { return every_nth<V>(p, first, last, stride); });
  }
}

// The first `length` floats of all channels, one channel after the other: streams that the prefetchers follow.
template <class V>
void copy_rows(const SparsePack& a, float* dst, const float* src, int64_t length) {
  const int64_t dst_stride = a.row_planes * a.column_planes * a.plane_length, src_stride = a.pitch;
  for (int64_t c = 0; c < a.channels; c++, dst += dst_stride, src += src_stride) {
    for (int64_t i = 0; i < length; i += V::kLanes) V::store(dst + i, V::load(src + i));
  }
}

// Runs in order: what a run's last vector writes past its end, the next run writes again.
template <class V>
void pack(const SparsePack& a) {
  constexpr int64_t kShort = 2;  // vectors of a run that are better copied one by one, for all channels
  int64_t begin = 0;
  for (int64_t i = 0; i < a.num_runs; begin += a.runs[i++ * a.column_planes].length) {
    for (int64_t plane = 0; plane < a.row_planes * a.column_planes; plane++) {
      const SparseRun& run = a.runs[i * a.column_planes + plane % a.column_planes];
      const int64_t row = a.row_start[plane / a.column_planes] + run.row * a.stride_h;
      const bool outside = row < 0 || row >= a.h;
      const int64_t first = outside ? 0 : run.first, last = outside ? 0 : run.last;
      float* const dst = a.dst + plane * a.plane_length + begin;
      const float* const src = a.x + run.image + row * a.w + run.column - run.first * a.stride_w;
      int64_t j = 0;
      if (run.length > kShort * V::kLanes && a.stride_w == 1 && run.first == 0 && first < last) {
        j = last / V::kLanes * V::kLanes;
        copy_rows<V>(a, dst, src, j);
      }
      for (; j < run.length; j += V::kLanes) {
        const int64_t left = a.plane_length - begin - j;
        pack_vector<V>(a, dst + j, src + j * a.stride_w, static_cast<int>(first - j), static_cast<int>(last - j),
                       static_cast<int>(left < V::kLanes ? left : V::kLanes));
      }
    }
  }
}

template <class V, class Last, class Inputs, int... T>
constexpr void set_tiles(SparseTileKernel* kernel, std::integer_sequence<int, T...>) {
  ((kernel[T] = tile<V, T + 1, Last, Inputs>), ...);
}

}  // namespace
}  // namespace cnncomp
