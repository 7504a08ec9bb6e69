// The micro-kernels of the sparse int8 convolution for non-zeros at random, and the table of all sparse int8 kernels. Included
// by the int8 translation units of each instruction set.
//
// The input is copied to planes of bytes: one channel of kBytes pixels is a vector. The non-zeros of an output channel are
// taken four at a time, whatever their channels and taps: the four vectors are interleaved, so that a 32-bit lane holds the
// four inputs of one pixel, and meet the broadcast weights. Within each 128 bits, result j holds pixels 4j..4j+3; packing
// the results to bytes undoes it.
#pragma once

#include "conv2d_sparse_int8_kernel.h"
#include "int8_bounds.h"
#include "int8_interleave.h"

namespace cnncomp {
namespace {

template <class S>
void gather_channels(const SparseInt8Gather& a) {
  const int64_t channels = (a.quads + 15) / 16 * 16;
  // Rows that are only read.
  const auto rows = const_cast<uint8_t* const*>(a.rows);
  turn<S, false>({a.dst, a.quad_stride, rows, a.pixels, a.channel, channels});
  if (!a.x_signed) return;
  const auto flip = Vec128::set(static_cast<int32_t>(0x80808080u));
  for (int64_t c = 0; c < channels; c++)
    for (uint8_t *p = a.dst + c * a.quad_stride, *const end = p + a.pixels; p < end; p += 16)
      Vec128::store(p, Vec128::bit_xor(Vec128::load(p), flip));
}

// acc += the groups of four non-zeros [begin, end).
template <class S, int T, bool STEPS, bool BOUNDED>
inline __attribute__((always_inline)) void add_scattered(const SparseInt8Tile& a, int32_t begin, int32_t end,
                                                         typename S::Int (&acc)[T][4]) {
  for (int64_t i = begin; i < end; i++) {
    const auto w = S::broadcast(reinterpret_cast<const uint8_t*>(a.values) + 4 * i);
    const uint16_t* const index = a.index + 4 * i;
    const uint8_t *const x0 = input_at<STEPS>(a, index[0]), *const x1 = input_at<STEPS>(a, index[1]);
    const uint8_t *const x2 = input_at<STEPS>(a, index[2]), *const x3 = input_at<STEPS>(a, index[3]);
#pragma GCC unroll 2
    for (int t = 0; t < T; t++) {
      const int at = t * S::kBytes;
      typename S::Int v[4];
      interleave<S>(S::load(x0 + at), S::load(x1 + at), S::load(x2 + at), S::load(x3 + at), v);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        if constexpr (BOUNDED) acc[t][j] = S::dot_bytes(acc[t][j], v[j], w);
        else acc[t][j] = S::dot(acc[t][j], S::input(v[j]), S::weight(w));
      }
    }
  }
}

// Sums of kBytes pixels as output bytes, which are in order again.
template <class S, Residual RESIDUAL>
inline __attribute__((always_inline)) typename S::Int round_scattered(const typename S::Int (&acc)[4], const uint8_t* residual,
                                                                      const Int8Epilogue& e, int64_t k) {
  const auto scale = S::set_float(e.scale[k]), bias = S::set_float(e.bias[k]), step = S::set_float(e.residual_scale);
  typename S::Int v[4], wide[4];
  if constexpr (RESIDUAL != kNoResidual) {
    const auto flip = S::set(RESIDUAL == kResidualS8 ? static_cast<int32_t>(0x80808080u) : 0), none = S::set(0);
    interleave<S>(S::bit_xor(S::load(residual), flip), none, none, none, wide);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    auto sum = scale_and_shift<S>(acc[j], scale, bias);
    if constexpr (RESIDUAL != kNoResidual) {
      const auto r = RESIDUAL == kResidualS8 ? S::add_int(wide[j], S::set(-128)) : wide[j];
      sum = S::add(sum, S::mul(S::to_float(r), step));
    }
    v[j] = S::round(sum);
  }
  return e.out_dtype == kS8 ? S::template pack<true>(v[0], v[1], v[2], v[3]) : S::template pack<false>(v[0], v[1], v[2], v[3]);
}

template <class S, int T, bool STEPS, bool BOUNDED, Residual RESIDUAL, Store STORE>
void scattered_tile_as(const SparseInt8Tile& a) {
  constexpr int kPart = 16 * sizeof(int32_t);  // from the pixels of 128 bits to the next, in memory
  auto* sums = reinterpret_cast<uint8_t*>(a.sums);
  for (int64_t k = a.k_begin; k < a.k_end; k++, sums += 4 * T * S::kBytes) {
    const int32_t begin = a.row_ptr[k], end = a.row_ptr[k + 1];
    if (STORE == kStoreSums && !a.first_block && begin == end) continue;
    typename S::Int acc[T][4];
#pragma GCC unroll 8
    for (int i = 0; i < 4 * T; i++) {
      uint8_t* const from = sums + i / 4 * 4 * S::kBytes + i % 4 * 16;
      acc[i / 4][i % 4] = a.first_block ? S::set(a.init[k]) : S::load_lanes(from, kPart);
    }
    add_scattered<S, T, STEPS, BOUNDED>(a, begin, end, acc);
    if constexpr (STORE == kStoreBytes) {
      const int64_t at = (k - a.k_begin) * a.byte_stride;
#pragma GCC unroll 2
      for (int t = 0; t < T; t++) {
        const uint8_t* const residual = RESIDUAL == kNoResidual ? nullptr : a.residual + at + t * S::kBytes;
        store_clamped<S>(a, k, round_scattered<S, RESIDUAL>(acc[t], residual, a.epilogue, k), at + t * S::kBytes);
      }
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < 4 * T; i++)
        S::store_lanes(sums + i / 4 * 4 * S::kBytes + i % 4 * 16, kPart, acc[i / 4][i % 4]);
    }
  }
}

template <class S, int T, bool BOUNDED>
void sum_scattered_by(const SparseInt8Tile& a) {
  const auto tile = [&]<bool STEPS>() {
    tile_as(a, [&]<Residual RESIDUAL, Store STORE>() { scattered_tile_as<S, T, STEPS, BOUNDED, RESIDUAL, STORE>(a); });
  };
  return a.step != 0 ? tile.template operator()<true>() : tile.template operator()<false>();
}

template <class S, int T>
void sum_scattered(const SparseInt8Tile& a) {
  if constexpr (S::kSaturates) {
    if (a.bounded) return sum_scattered_by<S, T, true>(a);
  }
  sum_scattered_by<S, T, false>(a);
}

template <class S>
constexpr auto bounded_or_null() {
  if constexpr (S::kSaturates) return quads_bounded<S>;
  else return static_cast<decltype(SparseInt8Kernels::bounded)>(nullptr);
}

// Tiles of up to MAX vectors.
template <class S, int MAX>
struct SparseInt8Tiles : SparseInt8Kernels {
  constexpr SparseInt8Tiles() : SparseInt8Kernels{S::kLanes, MAX, S::kSplits, {}, gather_quads<S>,
                                           finish_sums<S>, turn<S, true>, turn<S, false>, sum_bytes,
                                           {sum_scattered<S, 1>, sum_scattered<S, 2>}, gather_channels<S>,
                                           bounded_or_null<S>()} {
    fill<MAX>();
  }

 private:
  template <int T>
  constexpr void fill() {
    tile[T - 1] = sparse_tile<S, T>;
    if constexpr (T > 1) fill<T - 1>();
  }
};

template <class S, int MAX>
constexpr SparseInt8Kernels sparse_int8_kernels() {
  return SparseInt8Tiles<S, MAX>();
}

}  // namespace
}  // namespace cnncomp
