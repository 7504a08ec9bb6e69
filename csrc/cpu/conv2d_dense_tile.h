// The micro-kernels of the dense convolution on the planes of the sparse one; one source for every instruction set, for the
// reasons that conv2d_sparse_tile.h gives.
//
// A few output channels at a time: each input that is loaded meets one broadcast weight of each of them. Their weights lie
// next to each other.
#pragma once

#include <utility>

#include "conv2d_sparse_tile.h"

namespace cnncomp {
namespace {

struct DenseSteps {
  const char* x;
  int64_t step;
  explicit DenseSteps(const SparseTile& a) : x(reinterpret_cast<const char*>(a.x)), step(a.step) {}
  const float* operator[](int64_t i) const { return reinterpret_cast<const float*>(x + i * step); }
};

struct DenseOffsets {
  const char* x;
  const int32_t* offset;
  explicit DenseOffsets(const SparseTile& a) : x(reinterpret_cast<const char*>(a.x)), offset(a.offset) {}
  const float* operator[](int64_t i) const { return reinterpret_cast<const float*>(x + offset[i]); }
};

// How many output channels T vectors of pixels leave registers for.
template <class V>
constexpr int dense_rows(int t) {
  if (V::kRegisters == 32) return t <= 3 ? 8 : 4;
  return t == 1 ? 8 : t <= 3 ? 4 : 2;
}

// acc += all inputs of a block; w: of the first of M output channels.
template <class V, int T, int M, class Inputs>
inline __attribute__((always_inline)) void add_rows(const float* w, const Inputs& input, int64_t count,
                                                    Accumulators<V, T> (&acc)[M]) {
  for (int64_t i = 0; i < count; i++, w += kDenseRows) {
    const float* const x = input[i];
    if constexpr (T <= M) {
      typename V::Vec v[T];
#pragma GCC unroll 16
      for (int t = 0; t < T; t++) v[t] = V::load(x + t * V::kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const typename V::Vec weight = V::broadcast(w[m]);
#pragma GCC unroll 16
        for (int t = 0; t < T; t++) acc[m].v[t] = V::fma(weight, v[t], acc[m].v[t]);
      }
    } else {
      typename V::Vec weight[M];
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) weight[m] = V::broadcast(w[m]);
#pragma GCC unroll 16
      for (int t = 0; t < T; t++) {
        const typename V::Vec v = V::load(x + t * V::kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) acc[m].v[t] = V::fma(weight[m], v, acc[m].v[t]);
      }
    }
  }
}

template <class V, int T, class Inputs>
void dense_tile(const SparseTile& a) {
  constexpr int kRows = dense_rows<V>(T);
  const Inputs input(a);
  for (int64_t k = a.k_begin; k < a.k_end; k += kRows) {
    const int64_t rows = a.k_end - k < kRows ? a.k_end - k : kRows;
    Accumulators<V, T> acc[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++) {
      if (m < rows) begin_row(a, k + m, acc[m]);
      else acc[m].fill(0.0f);
    }
    add_rows<V, T, kRows>(a.values + k / kDenseRows * a.block_floats + k % kDenseRows, input, a.count, acc);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; m++) {
      if (m < rows) end_row(a, k + m, acc[m]);
    }
  }
}

template <class V, class Inputs, int... T>
constexpr void set_dense_tiles(SparseTileKernel* kernel, std::integer_sequence<int, T...>) {
  ((kernel[T] = dense_tile<V, T + 1, Inputs>), ...);
}

// Last: the narrower vector that the last one of a sparse tile may be, or V.
template <class V, class Last = V>
constexpr SparseKernels sparse_kernels_of() {
  constexpr auto all = std::make_integer_sequence<int, kSparseMaxTile>();
  constexpr auto dense = std::make_integer_sequence<int, kDenseMaxTile>();
  SparseKernels kernels{V::kLanes, Last::kLanes, {}, {}, {}, {}, pack<V>};
  set_tiles<V, V, Steps>(kernels.tile_steps[0], all);
  set_tiles<V, V, Offsets>(kernels.tile_offsets[0], all);
  set_tiles<V, Last, Steps>(kernels.tile_steps[1], all);
  set_tiles<V, Last, Offsets>(kernels.tile_offsets[1], all);
  set_dense_tiles<V, DenseSteps>(kernels.dense_steps, dense);
  set_dense_tiles<V, DenseOffsets>(kernels.dense_offsets, dense);
  return kernels;
}

}  // namespace
}  // namespace cnncomp
