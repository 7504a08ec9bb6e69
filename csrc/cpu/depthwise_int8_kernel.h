// Depthwise int8 convolution. Included by the int8 translation units of each instruction set.
//
// A vector of channels is loaded from each of four taps, and their bytes are interleaved so that every 32-bit lane holds
// the four taps of one channel. Within each 128 bits, result j holds channels 4j..4j+3; weights and constants are brought
// into this order beforehand, and packing the results to bytes undoes it.
#pragma once

#include "int8_epilogue.h"

namespace cnncomp {
namespace {

// 32-bit elements of src, of kBytes channels in natural order, for result j.
template <class S, class T>
inline void gather_lanes(const T* src, int j, T* dst) {
  for (int lane = 0; lane < S::kLanes; lane++) dst[lane] = src[lane / 4 * 16 + 4 * j + lane % 4];
}

template <class S>
struct DepthwiseConstants {
  typename S::Int init[4];
  typename S::Float scale[4], bias[4], hi[4];

  explicit DepthwiseConstants(const DepthwisePanel& a, int64_t channel) {
    float f[S::kLanes];
    int32_t i[S::kLanes];
    for (int j = 0; j < 4; j++) {
      gather_lanes<S>(a.init + channel, j, i);
      init[j] = S::load(i);
      gather_lanes<S>(a.epilogue.scale + channel, j, f);
      scale[j] = S::load_float(f);
      gather_lanes<S>(a.epilogue.bias + channel, j, f);
      bias[j] = S::load_float(f);
      gather_lanes<S>(a.epilogue.hi + channel, j, f);
      hi[j] = S::load_float(f);
    }
  }
};

template <class S, bool SIGNED>
inline typename S::Int load_channels(const uint8_t* p) {
  const auto x = S::load(p);
  return SIGNED ? S::bit_xor(x, S::set(static_cast<int32_t>(0x80808080u))) : x;
}

// The sums of kBytes channels of one pixel. rows: 4 * quads of them. weight: (quads, 4) vectors.
template <class S, bool SIGNED, int QUADS>
inline void depthwise_sums(const uint8_t* const* rows, int64_t quads, int64_t channel, const int8_t* weight,
                           typename S::Int (&acc)[4]) {
  if constexpr (QUADS > 0) quads = QUADS;
#pragma GCC unroll 4
  for (int64_t q = 0; q < quads; q++, rows += 4, weight += 4 * S::kBytes) {
    const auto a = load_channels<S, SIGNED>(rows[0] + channel), b = load_channels<S, SIGNED>(rows[1] + channel);
    const auto c = load_channels<S, SIGNED>(rows[2] + channel), d = load_channels<S, SIGNED>(rows[3] + channel);
    const auto ab_lo = S::zip8_lo(a, b), ab_hi = S::zip8_hi(a, b), cd_lo = S::zip8_lo(c, d), cd_hi = S::zip8_hi(c, d);
    acc[0] = S::dot(acc[0], S::input(S::zip16_lo(ab_lo, cd_lo)), S::weight(S::load(weight)));
    acc[1] = S::dot(acc[1], S::input(S::zip16_hi(ab_lo, cd_lo)), S::weight(S::load(weight + S::kBytes)));
    acc[2] = S::dot(acc[2], S::input(S::zip16_lo(ab_hi, cd_hi)), S::weight(S::load(weight + 2 * S::kBytes)));
    acc[3] = S::dot(acc[3], S::input(S::zip16_hi(ab_hi, cd_hi)), S::weight(S::load(weight + 3 * S::kBytes)));
  }
}

// 8-bit output without residual: straight from registers.
template <class S, bool OUT_SIGNED>
inline void depthwise_store(const typename S::Int (&acc)[4], const DepthwiseConstants<S>& k, typename S::Float lo, char* out,
                            int64_t valid) {
  typename S::Int q[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) q[j] = S::round(clamp<S>(scale_and_shift<S>(acc[j], k.scale[j], k.bias[j]), lo, k.hi[j]));
  const auto bytes = S::template pack<OUT_SIGNED>(q[0], q[1], q[2], q[3]);
  if (valid >= S::kBytes) {
    S::store(out, bytes);
  } else {
    char spare[S::kBytes];
    S::store(spare, bytes);
    __builtin_memcpy(out, spare, valid);
  }
}

// Any output and residual: the sums go through memory into natural order.
template <class S>
void depthwise_general(const typename S::Int (&acc)[4], EpilogueFn finish, const Int8Epilogue& e, int64_t pixel,
                       int64_t channel) {
  alignas(64) int32_t natural[S::kBytes], lanes[S::kLanes];
  for (int j = 0; j < 4; j++) {
    S::store(lanes, acc[j]);
    for (int part = 0; part < S::kLanes / 4; part++) __builtin_memcpy(natural + 16 * part + 4 * j, lanes + 4 * part, 16);
  }
  for (int b = 0; b < S::kBytes / kBlock; b++) finish(natural + b * kBlock, 0, 1, e, pixel, channel + b * kBlock);
}

// kBytes channels of all pixels. QUADS = 0: any number.
template <class S, bool SIGNED, int QUADS>
void depthwise_channels(const DepthwisePanel& a, int64_t channel) {
  const Int8Epilogue& e = a.epilogue;
  constexpr int kParts = S::kBytes / kBlock;
  for (int64_t q = 0; q < a.quads; q++)
    for (int j = 0; j < 4; j++)
      for (int part = 0; part < kParts; part++)
        __builtin_memcpy(a.scratch + (4 * q + j) * S::kBytes + 16 * part,
                         a.weight + ((channel / kBlock + part) * a.quads + q) * 4 * kBlock + 16 * j, 16);
  const DepthwiseConstants<S> constants(a, channel);
  const auto lo = S::set_float(e.lo);
  const EpilogueFn general = e.residual == nullptr && e.out_dtype != kF32 ? nullptr : epilogue_of<S, 1>(e);
  for (int64_t p = 0; p < a.pixels; p++) {
    typename S::Int acc[4];
    for (int j = 0; j < 4; j++) acc[j] = constants.init[j];
    depthwise_sums<S, SIGNED, QUADS>(a.rows + p * 4 * a.quads, a.quads, channel, a.scratch, acc);
    char* out = e.out + p * e.stride + channel;
    if (general != nullptr) {
      depthwise_general<S>(acc, general, e, p, channel);
    } else if (e.out_dtype == kS8) {
      depthwise_store<S, true>(acc, constants, lo, out, e.channels - channel);
    } else {
      depthwise_store<S, false>(acc, constants, lo, out, e.channels - channel);
    }
  }
}

// As many channels from `channel` on as whole vectors fit; returns the next channel.
template <class S>
int64_t depthwise_vectors(const DepthwisePanel& a, int64_t channel) {
  for (; channel + S::kBytes <= a.blocks * kBlock; channel += S::kBytes) {
    if (a.quads == 3) {
      (a.x_signed ? depthwise_channels<S, true, 3> : depthwise_channels<S, false, 3>)(a, channel);
    } else {
      (a.x_signed ? depthwise_channels<S, true, 0> : depthwise_channels<S, false, 0>)(a, channel);
    }
  }
  return channel;
}

}  // namespace
}  // namespace cnncomp
