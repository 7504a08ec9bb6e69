// Depthwise int8 convolution by columns. Included by the int8 translation units of each instruction set.
//
// The bytes under a column of the window are interleaved once, and meet the weights of each column of the window: the sums of
// the outputs that they belong to are all in flight. Order of channels as in depthwise_int8_kernel.h.
#pragma once

#include "depthwise_int8_kernel.h"

namespace cnncomp {
namespace {

// Of the column of input pixels that begin at x[0..R): for each quad of taps down the column four vectors.
template <class S, bool SIGNED, int R, class Use>
inline __attribute__((always_inline)) void interleave_column(const uint8_t* const (&x)[R], int64_t at, const Use& use) {
#pragma GCC unroll 4
  for (int quad = 0; quad < (R + 3) / 4; quad++) {
    typename S::Int v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      v[i] = 4 * quad + i < R ? load_channels<S, SIGNED>(x[4 * quad + i < R ? 4 * quad + i : 0] + at) : S::set(0);
    typename S::Int taps[4];
    interleave<S>(v[0], v[1], v[2], v[3], taps);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) use(quad, j, S::input(taps[j]));
  }
}

// One row of output pixels of kBytes channels. ANY: floats, or a nonlinearity; else neither.
template <class S, bool SIGNED, int R, int STRIDE, bool ANY>
void depthwise_row(const DepthwiseColumns& a, const uint8_t* const (&x)[R], const DepthwiseConstants<S>& k, int64_t channel,
                   char* out) {
  constexpr int kQuads = (R + 3) / 4, kFlight = (R - 1) / STRIDE + 1;  // outputs whose sums have begun
  const Int8Epilogue& e = a.epilogue;
  const int64_t valid = e.channels - channel;
  const bool out_signed = e.out_dtype == kS8, clamped = e.hi_bytes != nullptr;
  const auto lo = S::set(static_cast<int32_t>(e.lo_byte * 0x01010101u));
  // Copies, which no store to the output can change.
  typename S::Int weight[R * kQuads * 4];
#pragma GCC unroll 64
  for (int i = 0; i < R * kQuads * 4; i++) weight[i] = S::load(a.scratch + i * S::kBytes);
  const auto init = [&](int j) __attribute__((always_inline)) { return SIGNED ? k.init[j] : S::set(0); };
  const uint8_t* none[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) none[r] = a.zeros;
  typename S::Int acc[kFlight][4];
#pragma GCC unroll 8
  for (int f = 0; f < kFlight; f++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) acc[f][j] = init(j);
  // Column `w` of the image, which is column s of the oldest output's window.
  const auto add = [&](int64_t w, int s) __attribute__((always_inline)) {
    const auto use = [&](int quad, int j, typename S::Operand operand) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int f = 0; f < kFlight; f++) {
        const int tap = s - f * STRIDE;
        if (tap < 0) continue;
        acc[f][j] = S::dot(acc[f][j], operand, S::weight(weight[(tap * kQuads + quad) * 4 + j]));
      }
    };
    if (static_cast<uint64_t>(w) < static_cast<uint64_t>(a.w)) {
      interleave_column<S, SIGNED, R>(x, w * a.c, use);
    } else if constexpr (SIGNED) {
      interleave_column<S, SIGNED, R>(none, 0, use);
    }
  };
#pragma GCC unroll 8
  for (int s = 0; s < R - STRIDE; s++) add(s - a.pad, s);
  int64_t w = R - STRIDE - a.pad;
  const bool floats = ANY && e.out_dtype == kF32;
  const int64_t step = floats ? 4 * e.stride : e.stride;
  for (int64_t q = 0; q < a.q; q++, out += step, w += STRIDE) {
#pragma GCC unroll 8
    for (int i = 0; i < STRIDE; i++) add(w + i, R - STRIDE + i);
    typename S::Float t[4];
    typename S::Int sums[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) t[j] = scale_and_shift<S>(acc[0][j], k.scale[j], k.bias[j]);
    if (ANY && e.nonlinearity != kNone) activate<S>(t, e);
    const auto next = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int f = 0; f < kFlight; f++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) acc[f][j] = f + 1 < kFlight ? acc[f + 1 < kFlight ? f + 1 : 0][j] : init(j);
    };
    if (floats) {
      store_floats<S>(t, k, S::set_float(e.lo), out, valid);
      next();
      continue;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) sums[j] = S::round(t[j]);
    auto bytes = out_signed ? S::template pack<true>(sums[0], sums[1], sums[2], sums[3])
                            : S::template pack<false>(sums[0], sums[1], sums[2], sums[3]);
    if (clamped) {
      const auto hi = S::load(e.hi_bytes + channel);
      bytes = out_signed ? S::template clamp_bytes<true>(bytes, lo, hi) : S::template clamp_bytes<false>(bytes, lo, hi);
    }
    store_chunks<S, 0, S::kBytes / kBlock>(out, bytes, valid);
    next();
  }
}

template <class S, bool SIGNED, int R, int STRIDE, bool ANY>
void depthwise_rows(const DepthwiseColumns& a, int64_t channel) {
  constexpr int64_t kQuads = R * ((R + 3) / 4);
  order_weights<S>(a.weight + channel / kBlock * kQuads * 4 * kBlock, kQuads, a.scratch);
  const DepthwiseConstants<S> constants(a.init, a.epilogue, channel);
  for (int64_t row = 0; row < a.num_rows; row++) {
    const uint8_t* x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) x[r] = a.rows[row * R + r] + channel;
    const int64_t at = row * a.q * a.epilogue.stride + channel;
    char* const out = a.epilogue.out + (a.epilogue.out_dtype == kF32 ? 4 * at : at);
    depthwise_row<S, SIGNED, R, STRIDE, ANY>(a, x, constants, channel, out);
  }
}

// As many channels from `channel` on as whole vectors fit; returns the next channel.
template <class S, int R, int STRIDE, bool ANY>
int64_t depthwise_column_vectors(const DepthwiseColumns& a, int64_t channel) {
  for (; channel + S::kBytes <= a.end * kBlock; channel += S::kBytes)
    (a.x_signed ? depthwise_rows<S, true, R, STRIDE, ANY> : depthwise_rows<S, false, R, STRIDE, ANY>)(a, channel);
  return channel;
}

// By vectors of each of the types in turn, the widest first.
template <int R, int STRIDE, bool ANY, class... S>
void depthwise_columns(const DepthwiseColumns& a) {
  int64_t channel = a.block * kBlock;
  ((channel = depthwise_column_vectors<S, R, STRIDE, ANY>(a, channel)), ...);
}

}  // namespace
}  // namespace cnncomp
