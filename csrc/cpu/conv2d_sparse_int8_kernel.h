// The micro-kernels of the sparse int8 convolution. Included by the int8 translation units of each instruction set.
//
// The input is copied to planes of quads: four channels of a pixel are one 32-bit lane, so a vector holds a quad of kLanes
// pixels. A non-zero quad of weights is broadcast and meets T such vectors; each tap is a flat offset into the planes.
// int8 inputs have their top bit flipped on the way (init holds the correction). Without products of bytes, quads are split into
// 16-bit halves on the way, each in a plane of its own: non-zeros meet them often.
#pragma once

#include "int8_epilogue.h"

namespace cnncomp {
namespace {

// What a tile leaves.
enum Store : int { kStoreSums, kStoreFloats, kStoreBytes };

// v: in each 128 bits, four rows of a 4x4 matrix of 32-bit elements; they become its columns.
template <class S>
inline void transpose4(typename S::Int (&v)[4]) {
  const auto a = S::zip32_lo(v[0], v[1]), b = S::zip32_lo(v[2], v[3]);
  const auto c = S::zip32_hi(v[0], v[1]), d = S::zip32_hi(v[2], v[3]);
  v[0] = S::zip64_lo(a, b);
  v[1] = S::zip64_hi(a, b);
  v[2] = S::zip64_lo(c, d);
  v[3] = S::zip64_hi(c, d);
}

// Sixteen bytes, `at` bytes into each of kLanes rows, transposed: v[i] holds the rows' i-th 32 bits.
template <class S>
inline void load_columns(const uint8_t* const* rows, int64_t at, typename S::Int (&v)[4]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) v[j] = S::load_rows(rows + j, at);
  transpose4<S>(v);
}

template <class S>
inline __attribute__((always_inline)) void store_quads(const SparseInt8Gather& a, uint8_t* to, typename S::Int quads) {
  if constexpr (S::kSplits) {
    const auto halves = S::input(quads);
    S::store(to, halves.even);
    S::store(to + a.odd, halves.odd);
  } else {
    S::store(to, quads);
  }
}

template <class S>
inline __attribute__((always_inline)) typename S::Operand load_quads(const SparseInt8Tile& a, const uint8_t* from) {
  if constexpr (S::kSplits) return {S::load(from), S::load(from + a.odd)};
  else return S::input(S::load(from));
}

template <class S>
void gather_quads(const SparseInt8Gather& a) {
  const auto flip = S::set(a.x_signed ? static_cast<int32_t>(0x80808080u) : 0);
  for (int64_t p = 0; p < a.pixels; p += S::kLanes) {
    uint8_t* dst = a.dst + 4 * p;
    for (int64_t quad = 0; quad < a.quads; quad += 4, dst += 4 * a.quad_stride) {
      typename S::Int v[4];
      load_columns<S>(a.rows + p, a.channel + 4 * quad, v);
      const int count = a.quads - quad < 4 ? static_cast<int>(a.quads - quad) : 4;
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        if (i < count) store_quads<S>(a, dst + i * a.quad_stride, S::bit_xor(v[i], flip));
    }
  }
}

// STEPS: whether a.step says where an index is. That is a load less, and loads are what these kernels wait for.
template <bool STEPS>
inline __attribute__((always_inline)) const uint8_t* input_at(const SparseInt8Tile& a, uint16_t index) {
  if constexpr (STEPS) return a.x + index * a.step;
  return a.x + a.offset[index];
}

// acc += the non-zeros [begin, end). A short tile has too few sums to fill the latency of the dot product: there, every
// second non-zero goes to a set of sums of its own. With AVX-512 that pays up to four vectors (Zen 4); at seven it costs 8 %.
template <class S, int T, bool STEPS>
inline __attribute__((always_inline)) void add_quads(const SparseInt8Tile& a, int32_t begin, int32_t end,
                                                     typename S::Int (&acc)[T]) {
  const auto add = [&](int32_t i, typename S::Int(&to)[T]) __attribute__((always_inline)) {
    const auto w = S::weight(S::broadcast(reinterpret_cast<const uint8_t*>(a.values) + 4 * static_cast<int64_t>(i)));
    const uint8_t* const x = input_at<STEPS>(a, a.index[i]);
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) to[t] = S::dot(to[t], load_quads<S>(a, x + t * S::kBytes), w);
  };
  int32_t i = begin;
  if constexpr (T < (S::kLanes == 16 ? 5 : 4)) {
    typename S::Int more[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) more[t] = S::set(0);
    for (; i + 2 <= end; i += 2) {
      add(i, acc);
      add(i + 1, more);
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) acc[t] = S::add_int(acc[t], more[t]);
  }
  for (; i < end; i++) add(i, acc);
}

// Four vectors of a channel's sums, from `first` on, as output bytes. Rounding keeps the order of numbers, so that clamping
// the rounded ones to rounded bounds is the same as the epilogue's clamp before it, and bytes are four to a lane. With a
// residual of floats what is rounded need not fit an int32: it is clamped before. residual: of pixel 0.
template <class S, Residual RESIDUAL, int T>
inline __attribute__((always_inline)) typename S::Int round_sums(const typename S::Int (&acc)[T], int first,
                                                                 const char* residual, const Int8Epilogue& e, int64_t k) {
  const auto scale = S::set_float(e.scale[k]), bias = S::set_float(e.bias[k]), step = S::set_float(e.residual_scale);
  typename S::Int v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const int t = first + i;
    if (t >= T) {
      v[i] = v[0];
      continue;
    }
    auto sum = scale_and_shift<S>(acc[t], scale, bias);
    if constexpr (RESIDUAL != kNoResidual) sum = S::add(sum, S::mul(load_residual<S, RESIDUAL>(residual, t), step));
    if constexpr (RESIDUAL == kResidualF32) sum = clamp<S>(sum, S::set_float(e.lo), S::set_float(e.hi[k]));
    v[i] = S::round(sum);
  }
  return S::in_order(e.out_dtype == kS8 ? S::template pack<true>(v[0], v[1], v[2], v[3])
                                        : S::template pack<false>(v[0], v[1], v[2], v[3]));
}

// Rounded bytes of channel k, clamped to its bounds.
template <class S>
inline __attribute__((always_inline)) void store_clamped(const SparseInt8Tile& a, int64_t k, typename S::Int v, int64_t at) {
  const Int8Epilogue& e = a.epilogue;
  if (e.hi_bytes != nullptr) {
    const auto lo = S::set(static_cast<int32_t>(e.lo_byte * 0x01010101u));
    const auto hi = S::set(static_cast<int32_t>(e.hi_bytes[k] * 0x01010101u));
    v = e.out_dtype == kS8 ? S::template clamp_bytes<true>(v, lo, hi) : S::template clamp_bytes<false>(v, lo, hi);
  }
  S::store(a.bytes + at, v);
}

template <class S, Residual RESIDUAL, int T>
inline __attribute__((always_inline)) void store_channel(const SparseInt8Tile& a, int64_t k,
                                                         const typename S::Int (&acc)[T]) {
  const int64_t at = (k - a.k_begin) * a.byte_stride;
  const char* residual = nullptr;
  if constexpr (RESIDUAL == kResidualF32) {
    residual = reinterpret_cast<const char*>(a.addend + (k - a.k_begin) * T * S::kLanes);
  } else if constexpr (RESIDUAL != kNoResidual) {
    residual = reinterpret_cast<const char*>(a.residual + at);
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; t += 4) {
    const auto bytes = round_sums<S, RESIDUAL, T>(acc, t, residual, a.epilogue, k);
    if constexpr (RESIDUAL == kResidualF32) {
      S::store(a.bytes + at + t * S::kLanes, bytes);
    } else {
      store_clamped<S>(a, k, bytes, at + t * S::kLanes);
    }
  }
}

// A channel's sums as float outputs without a residual.
template <class S, int T>
inline __attribute__((always_inline)) void store_floats(const Int8Epilogue& e, int64_t k, const typename S::Int (&acc)[T],
                                                        float* to) {
  const auto scale = S::set_float(e.scale[k]), bias = S::set_float(e.bias[k]);
  const auto lo = S::set_float(e.lo), hi = S::set_float(e.hi[k]);
#pragma GCC unroll 16
  for (int t = 0; t < T; t++)
    S::store_float(to + t * S::kLanes, clamp<S>(scale_and_shift<S>(acc[t], scale, bias), lo, hi));
}

template <class S, int T, bool STEPS, Residual RESIDUAL, Store STORE>
void sparse_tile_as(const SparseInt8Tile& a) {
  int32_t* sums = a.sums;
  for (int64_t k = a.k_begin; k < a.k_end; k++, sums += T * S::kLanes) {
    const int32_t begin = a.row_ptr[k], end = a.row_ptr[k + 1];
    if (STORE == kStoreSums && !a.first_block && begin == end) continue;
    typename S::Int acc[T];
    if (a.first_block) {
      const auto init = S::set(a.init[k]);
#pragma GCC unroll 16
      for (int t = 0; t < T; t++) acc[t] = init;
    } else {
#pragma GCC unroll 16
      for (int t = 0; t < T; t++) acc[t] = S::load(sums + t * S::kLanes);
    }
    add_quads<S, T, STEPS>(a, begin, end, acc);
    if constexpr (STORE == kStoreBytes) {
      store_channel<S, RESIDUAL, T>(a, k, acc);
    } else if constexpr (STORE == kStoreFloats) {
      store_floats<S, T>(a.epilogue, k, acc, reinterpret_cast<float*>(sums));
    } else {
#pragma GCC unroll 16
      for (int t = 0; t < T; t++) S::store(sums + t * S::kLanes, acc[t]);
    }
  }
}

// tile<RESIDUAL, STORE>(), as what `a` asks for; floats have no part in it.
template <class Tile>
void tile_as(const SparseInt8Tile& a, Tile tile) {
  if (a.bytes == nullptr) return tile.template operator()<kNoResidual, kStoreSums>();
  if (a.residual == nullptr) return tile.template operator()<kNoResidual, kStoreBytes>();
  if (a.epilogue.residual_dtype == kU8) return tile.template operator()<kResidualU8, kStoreBytes>();
  return tile.template operator()<kResidualS8, kStoreBytes>();
}

template <class S, int T, bool STEPS>
void sparse_tile_by(const SparseInt8Tile& a) {
  if (a.floats) return sparse_tile_as<S, T, STEPS, kNoResidual, kStoreFloats>(a);
  if (a.bytes != nullptr && a.addend != nullptr) return sparse_tile_as<S, T, STEPS, kResidualF32, kStoreBytes>(a);
  tile_as(a, [&]<Residual RESIDUAL, Store STORE>() { sparse_tile_as<S, T, STEPS, RESIDUAL, STORE>(a); });
}

template <class S, int T>
void sparse_tile(const SparseInt8Tile& a) {
  return a.step != 0 ? sparse_tile_by<S, T, true>(a) : sparse_tile_by<S, T, false>(a);
}

// v: in each 128 bits, sixteen rows of a 16x16 matrix of bytes; they become its columns. Zipping rows i and i + 8 turns the
// eight bits of a byte's row and column by one.
template <class S>
inline void transpose16(typename S::Int (&v)[16]) {
#pragma GCC unroll 4
  for (int turn = 0; turn < 4; turn++) {
    typename S::Int zipped[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      zipped[2 * i] = S::zip8_lo(v[i], v[i + 8]);
      zipped[2 * i + 1] = S::zip8_hi(v[i], v[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = zipped[i];
  }
}

// Sixteen pixels, S::kBytes channels. Of the planes, those of channels 16 apart lie in one vector.
template <class S, bool TO_ROWS>
inline void turn_pixels(const SparseInt8Turn& a, int64_t pixel, int64_t channel) {
  uint8_t* const planes = a.planes + channel * a.stride + pixel;
  uint8_t* const* const rows = a.rows + pixel;
  const int64_t at = a.channel + channel, step = 16 * a.stride;
  typename S::Int v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) v[i] = TO_ROWS ? S::load_lanes(planes + i * a.stride, step) : S::load(rows[i] + at);
  transpose16<S>(v);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    if constexpr (TO_ROWS) {
      S::store(rows[i] + at, v[i]);
    } else {
      S::store_lanes(planes + i * a.stride, step, v[i]);
    }
  }
}

template <class S, bool TO_ROWS>
void turn(const SparseInt8Turn& a) {
  for (int64_t pixel = 0; pixel < a.pixels; pixel += 16) {
    int64_t channel = 0;
    for (; channel + S::kBytes <= a.channels; channel += S::kBytes) turn_pixels<S, TO_ROWS>(a, pixel, channel);
    for (; channel < a.channels; channel += 16) turn_pixels<Vec128, TO_ROWS>(a, pixel, channel);
  }
}

// Any outputs: the sums of 16 channels are turned to channels innermost, which is how the dense kernel's epilogue takes them.
template <class S>
void finish_sums(const SparseInt8Finish& a) {
  constexpr int kParts = kBlock / S::kLanes;
  const EpilogueFn epilogue = epilogue_of<S, 1>(a.epilogue);
  for (int64_t c = 0; c < a.channels; c += kBlock) {
    const uint8_t* rows[kBlock];
    for (int i = 0; i < kBlock; i++) rows[i] = reinterpret_cast<const uint8_t*>(a.sums + (c + i) * a.tile);
    for (int64_t p = 0; p < a.tile; p += 4) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; part++) {
        typename S::Int v[4];
        load_columns<S>(rows + part * S::kLanes, 4 * p, v);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) S::store(a.turned + (p + i) * kBlock + part * S::kLanes, v[i]);
      }
    }
    for (int64_t i = 0; i < a.num_segments; i++) {
      const SparseInt8Segment& s = a.segments[i];
      epilogue(a.turned + s.tile_begin * kBlock, kBlock, s.length, a.epilogue, s.out_begin, a.channel + c);
    }
  }
}

int32_t sum_bytes(const int8_t* values, int64_t count) {
  const auto ones = Vec128::input(Vec128::set(0x01010101));
  auto acc = Vec128::set(0);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) acc = Vec128::dot(acc, ones, Vec128::weight(Vec128::load(values + 4 * i)));
  int32_t lanes[Vec128::kLanes], sum = 0;
  Vec128::store(lanes, acc);
  for (const int32_t lane : lanes) sum += lane;
  for (i *= 4; i < 4 * count; i++) sum += values[i];
  return sum;
}

}  // namespace
}  // namespace cnncomp
