// The micro-kernels of the sparse int8 convolution. Included by the int8 translation units of each instruction set.
//
// The input is copied to planes of quads: four channels of a pixel are one 32-bit lane, so a vector holds a quad of kLanes
// pixels. A non-zero quad of weights is broadcast and meets T such vectors; each tap is a flat offset into the planes.
// int8 inputs have their top bit flipped on the way (init holds the correction).
#pragma once

#include "int8_epilogue.h"

namespace cnncomp {
namespace {

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
        if (i < count) S::store(dst + i * a.quad_stride, S::bit_xor(v[i], flip));
    }
  }
}

// acc += the non-zeros [begin, end). A short tile has too few sums to fill the latency of the dot product: there, every
// second non-zero goes to a set of sums of its own.
template <class S, int T>
inline __attribute__((always_inline)) void add_quads(const SparseInt8Tile& a, int32_t begin, int32_t end,
                                                     typename S::Int (&acc)[T]) {
  const auto add = [&](int32_t i, typename S::Int(&to)[T]) __attribute__((always_inline)) {
    const auto w = S::weight(S::broadcast(reinterpret_cast<const uint8_t*>(a.values) + 4 * static_cast<int64_t>(i)));
    const uint8_t* const x = a.x + a.offset[a.index[i]];
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) to[t] = S::dot(to[t], S::input(S::load(x + t * S::kBytes)), w);
  };
  int32_t i = begin;
  if constexpr (T < 4) {
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

template <class S, int T>
void sparse_tile(const SparseInt8Tile& a) {
  int32_t* sums = a.sums;
  for (int64_t k = a.k_begin; k < a.k_end; k++, sums += T * S::kLanes) {
    const int32_t begin = a.row_ptr[k], end = a.row_ptr[k + 1];
    if (!a.first_block && begin == end) continue;
    typename S::Int acc[T];
    if (a.first_block) {
      const auto init = S::set(a.init[k]);
#pragma GCC unroll 16
      for (int t = 0; t < T; t++) acc[t] = init;
    } else {
#pragma GCC unroll 16
      for (int t = 0; t < T; t++) acc[t] = S::load(sums + t * S::kLanes);
    }
    add_quads<S, T>(a, begin, end, acc);
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) S::store(sums + t * S::kLanes, acc[t]);
  }
}

// The residual's byte I of each lane.
template <class S, Residual RESIDUAL, int I>
inline typename S::Float residual_byte(typename S::Int quads) {
  if constexpr (RESIDUAL == kResidualU8) {
    return S::to_float(S::bit_and(S::template shift_right<8 * I>(quads), S::set(255)));
  } else {
    return S::to_float(S::template shift_right<24>(S::template shift_left<24 - 8 * I>(quads)));
  }
}

// A bound of the epilogue as an output byte.
inline uint8_t byte_bound(float bound, Dtype out) {
  const float least = out == kS8 ? -128.0f : 0.0f, most = out == kS8 ? 127.0f : 255.0f;
  const float inside = bound < least ? least : bound > most ? most : bound;
  return static_cast<uint8_t>(static_cast<int32_t>(__builtin_rintf(inside)));
}

// What the epilogue does to four channels, broadcast. Copied from memory once: a store in the loop could change it there.
template <class S, Dtype OUT>
struct QuadConstants {
  typename S::Float scale[4], bias[4], residual_scale;
  typename S::Int lo, hi;  // of the outputs' bytes

  QuadConstants(const Int8Epilogue& e, int64_t channel) : residual_scale(S::set_float(e.residual_scale)) {
    uint32_t bounds = 0;
    for (int i = 0; i < 4; i++) {
      scale[i] = S::set_float(e.scale[channel + i]);
      bias[i] = S::set_float(e.bias[channel + i]);
      bounds |= static_cast<uint32_t>(byte_bound(e.hi[channel + i], OUT)) << 8 * i;
    }
    hi = S::set(static_cast<int32_t>(bounds));
    lo = S::set(static_cast<int32_t>(byte_bound(e.lo, OUT) * 0x01010101u));
  }
};

// Channel I of four, of a vector of pixels, rounded.
template <class S, Dtype OUT, Residual RESIDUAL, int I>
inline typename S::Int finish_channel(const int32_t* sums, typename S::Int residual, const QuadConstants<S, OUT>& c) {
  auto t = scale_and_shift<S>(S::load(sums), c.scale[I], c.bias[I]);
  if constexpr (RESIDUAL != kNoResidual) t = S::add(t, S::mul(residual_byte<S, RESIDUAL, I>(residual), c.residual_scale));
  return S::round(t);
}

// 8-bit outputs in whole blocks of 16 channels: computed on vectors of pixels, as the sums lie, and turned to channels
// innermost as bytes; all channels of a pixel one after the other, for they share cache lines. Rounding keeps the order of
// numbers, so that clamping the rounded ones to rounded bounds is the same as the epilogue's clamp before it, and bytes are
// four to a lane.
template <class S, Dtype OUT, Residual RESIDUAL>
void finish_bytes(const SparseInt8Finish& a) {
  const int64_t tile = a.tile;
  for (int64_t quad = 0; quad < a.channels / 4; quad++) {
    const int32_t* const sums = a.sums + 4 * quad * tile;
    int32_t* const quads = a.turned + quad * tile;
    const QuadConstants<S, OUT> c(a.epilogue, a.channel + 4 * quad);
    for (int64_t p = 0; p < tile; p += S::kLanes) {
      const auto residual = RESIDUAL == kNoResidual ? S::set(0) : S::load(quads + p);
      const auto bytes = S::template pack<OUT == kS8>(finish_channel<S, OUT, RESIDUAL, 0>(sums + p, residual, c),
                                                      finish_channel<S, OUT, RESIDUAL, 1>(sums + tile + p, residual, c),
                                                      finish_channel<S, OUT, RESIDUAL, 2>(sums + 2 * tile + p, residual, c),
                                                      finish_channel<S, OUT, RESIDUAL, 3>(sums + 3 * tile + p, residual, c));
      S::store(quads + p, S::template clamp_bytes<OUT == kS8>(S::turn_bytes(bytes), c.lo, c.hi));
    }
  }
  for (int64_t p = 0; p < tile; p += S::kLanes) {
    for (int64_t c = 0; c < a.channels; c += kBlock) {
      typename S::Int v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) v[i] = S::load(a.turned + (c / 4 + i) * tile + p);
      transpose4<S>(v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) S::store_rows(a.out_rows + p + i, a.channel + c, v[i]);
    }
  }
}

template <class S, Dtype OUT>
void finish_bytes_of(const SparseInt8Finish& a) {
  if (a.epilogue.residual == nullptr) return finish_bytes<S, OUT, kNoResidual>(a);
  for (int64_t p = 0; p < a.tile; p += S::kLanes) {
    for (int64_t c = 0; c < a.channels; c += kBlock) {
      typename S::Int v[4];
      load_columns<S>(a.residual_rows + p, a.channel + c, v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) S::store(a.turned + (c / 4 + i) * a.tile + p, v[i]);
    }
  }
  return a.epilogue.residual_dtype == kU8 ? finish_bytes<S, OUT, kResidualU8>(a) : finish_bytes<S, OUT, kResidualS8>(a);
}

// Any outputs: the sums of 16 channels are turned to channels innermost, which is how the dense kernel's epilogue takes them.
template <class S>
void finish_any(const SparseInt8Finish& a) {
  constexpr int kParts = kBlock / S::kLanes;
  const EpilogueFn epilogue = epilogue_in_table<S, 1, false>(a.epilogue);
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

template <class S>
void finish_sums(const SparseInt8Finish& a) {
  if (a.out_rows == nullptr || a.channels % kBlock != 0) {
    finish_any<S>(a);
  } else if (a.epilogue.out_dtype == kU8) {
    finish_bytes_of<S, kU8>(a);
  } else {
    finish_bytes_of<S, kS8>(a);
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

// Tiles of up to MAX vectors.
template <class S, int MAX>
struct SparseInt8Tiles : SparseInt8Kernels {
  constexpr SparseInt8Tiles() : SparseInt8Kernels{S::kLanes, MAX, {}, gather_quads<S>, finish_sums<S>, sum_bytes} {
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
