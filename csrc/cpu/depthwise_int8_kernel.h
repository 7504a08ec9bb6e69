// Depthwise int8 convolution. Included by the int8 translation units of each instruction set.
//
// A vector of channels is loaded from each of four taps, and their bytes are interleaved so that every 32-bit lane holds
// the four taps of one channel. Within each 128 bits, result j holds channels 4j..4j+3; weights and constants are brought
// into this order beforehand, and packing the results to bytes undoes it.
#pragma once

#include "int8_epilogue.h"
#include "int8_interleave.h"

namespace cnncomp {
namespace {

// 32-bit elements of src, of kBytes channels in natural order, for result j.
template <class S, class T>
inline void gather_lanes(const T* src, int j, T* dst) {
  for (int part = 0; part < S::kLanes / 4; part++) __builtin_memcpy(dst + 4 * part, src + 16 * part + 4 * j, 16);
}

template <class S>
struct DepthwiseConstants {
  typename S::Int init[4];
  typename S::Float scale[4], bias[4], hi[4], shift[4];

  DepthwiseConstants(const int32_t* inits, const Int8Epilogue& e, int64_t channel) {
    float f[S::kLanes];
    int32_t i[S::kLanes];
    for (int j = 0; j < 4; j++) {
      gather_lanes<S>(inits + channel, j, i);
      init[j] = S::load(i);
      gather_lanes<S>(e.scale + channel, j, f);
      scale[j] = S::load_float(f);
      gather_lanes<S>(e.bias + channel, j, f);
      bias[j] = S::load_float(f);
      gather_lanes<S>(e.hi + channel, j, f);
      hi[j] = S::load_float(f);
      if (e.shift != nullptr) gather_lanes<S>(e.shift + channel, j, f);
      shift[j] = S::load_float(f);
    }
  }
};

template <class S, bool SIGNED>
inline typename S::Int load_channels(const uint8_t* p) {
  const auto x = S::load(p);
  return SIGNED ? S::bit_xor(x, S::set(static_cast<int32_t>(0x80808080u))) : x;
}

// The sums of kBytes channels of one pixel; with SHIFT also those of the inputs alone. rows: 4 * quads of them. weight:
// (quads, 4) vectors.
template <class S, bool SIGNED, int QUADS, bool SHIFT>
inline void depthwise_sums(const uint8_t* const* rows, int64_t quads, int64_t channel, const int8_t* weight,
                           typename S::Int (&acc)[4], typename S::Int (&window)[4]) {
  if constexpr (QUADS > 0) quads = QUADS;
  const auto ones = S::weight(S::set(0x01010101));
#pragma GCC unroll 4
  for (int64_t q = 0; q < quads; q++, rows += 4, weight += 4 * S::kBytes) {
    const auto a = load_channels<S, SIGNED>(rows[0] + channel), b = load_channels<S, SIGNED>(rows[1] + channel);
    const auto c = load_channels<S, SIGNED>(rows[2] + channel), d = load_channels<S, SIGNED>(rows[3] + channel);
    typename S::Int taps[4];
    interleave<S>(a, b, c, d, taps);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const auto x = S::input(taps[j]);
      acc[j] = S::dot(acc[j], x, S::weight(S::load(weight + j * S::kBytes)));
      if constexpr (SHIFT) window[j] = S::dot(window[j], x, ones);
    }
  }
}

// Four results, as 32 bits each, in natural order.
template <class S>
inline void store_natural(const typename S::Int (&values)[4], void* natural) {
  alignas(64) int32_t lanes[S::kLanes];
  auto* const to = static_cast<char*>(natural);
  for (int j = 0; j < 4; j++) {
    S::store(lanes, values[j]);
    for (int part = 0; part < S::kLanes / 4; part++) __builtin_memcpy(to + 64 * part + 16 * j, lanes + 4 * part, 16);
  }
}

// Clamped floats.
template <class S>
inline void store_floats(const typename S::Float (&t)[4], const DepthwiseConstants<S>& k, typename S::Float lo, char* out,
                         int64_t valid) {
  typename S::Int words[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) words[j] = S::as_int(clamp<S>(t[j], lo, k.hi[j]));
  if (valid >= S::kBytes) return store_natural<S>(words, out);
  char spare[4 * S::kBytes];
  store_natural<S>(words, spare);
  __builtin_memcpy(out, spare, 4 * valid);
}

// With a nonlinearity or of floats, without residual.
template <class S, bool SHIFT>
inline void depthwise_store_any(const typename S::Int (&acc)[4], const typename S::Int (&window)[4],
                                const DepthwiseConstants<S>& k, const Int8Epilogue& e, char* out, int64_t valid) {
  typename S::Float t[4];
  const auto lo = S::set_float(e.lo);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    t[j] = scale_and_shift<S>(acc[j], k.scale[j], k.bias[j]);
    if constexpr (SHIFT) t[j] = add_window<S>(t[j], k.shift[j], window[j]);
  }
  if (e.nonlinearity != kNone) activate<S>(t, e);
  if (e.out_dtype == kF32) return store_floats<S>(t, k, lo, out, valid);
  typename S::Int q[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) q[j] = S::round(clamp<S>(t[j], lo, k.hi[j]));
  const auto bytes = e.out_dtype == kS8 ? S::template pack<true>(q[0], q[1], q[2], q[3])
                                        : S::template pack<false>(q[0], q[1], q[2], q[3]);
  char spare[S::kBytes];
  S::store(valid >= S::kBytes ? out : spare, bytes);
  if (valid < S::kBytes) __builtin_memcpy(out, spare, valid);
}

// 8-bit output without residual: straight from registers.
template <class S, bool OUT_SIGNED, bool SHIFT>
inline void depthwise_store(const typename S::Int (&acc)[4], const typename S::Int (&window)[4],
                            const DepthwiseConstants<S>& k, typename S::Float lo, char* out, int64_t valid) {
  typename S::Int q[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    auto t = scale_and_shift<S>(acc[j], k.scale[j], k.bias[j]);
    if constexpr (SHIFT) t = add_window<S>(t, k.shift[j], window[j]);
    q[j] = S::round(clamp<S>(t, lo, k.hi[j]));
  }
  const auto bytes = S::template pack<OUT_SIGNED>(q[0], q[1], q[2], q[3]);
  if (valid >= S::kBytes) {
    S::store(out, bytes);
  } else {
    char spare[S::kBytes];
    S::store(spare, bytes);
    __builtin_memcpy(out, spare, valid);
  }
}

// Any output and residual: the sums go through memory into natural order. With SHIFT, e's window is set here.
template <class S, bool SHIFT>
void depthwise_general(const typename S::Int (&acc)[4], const typename S::Int (&window)[4], EpilogueFn finish,
                       Int8Epilogue& e, int64_t pixel, int64_t channel) {
  alignas(64) int32_t natural[S::kBytes], windows[S::kBytes];
  store_natural<S>(acc, natural);
  if constexpr (SHIFT) store_natural<S>(window, windows);
  for (int b = 0; b < S::kBytes / kBlock; b++) {
    if constexpr (SHIFT) e.window = windows + b * kBlock;
    finish(natural + b * kBlock, 0, 1, e, pixel, channel + b * kBlock);
  }
}

// The weights of kBytes channels in the order of the sums: (quads, 4) vectors. weight: of the first channel.
template <class S>
inline void order_weights(const int8_t* weight, int64_t quads, int8_t* ordered) {
  for (int64_t q = 0; q < quads; q++)
    for (int j = 0; j < 4; j++)
      for (int part = 0; part < S::kBytes / kBlock; part++)
        __builtin_memcpy(ordered + (4 * q + j) * S::kBytes + 16 * part, weight + (part * quads + q) * 4 * kBlock + 16 * j, 16);
}

// kBytes channels of all pixels. QUADS = 0: any number.
template <class S, bool SIGNED, int QUADS, bool SHIFT>
void depthwise_channels(const DepthwisePanel& a, int64_t channel) {
  Int8Epilogue e = a.epilogue;
  e.window_per_channel = true;
  order_weights<S>(a.weight + channel / kBlock * a.quads * 4 * kBlock, a.quads, a.scratch);
  const DepthwiseConstants<S> constants(a.init, e, channel);
  const auto lo = S::set_float(e.lo);
  const EpilogueFn general = e.residual == nullptr ? nullptr : epilogue_of<S, 1>(e);
  const bool any = e.out_dtype == kF32 || e.nonlinearity != kNone;
  // Taps beyond the last are zeros too.
  const auto no_window = S::set(SIGNED ? static_cast<int32_t>(-128 * 4 * a.quads) : 0);
  for (int64_t p = 0; p < a.pixels; p++) {
    typename S::Int acc[4], window[4];
    for (int j = 0; j < 4; j++) acc[j] = constants.init[j], window[j] = no_window;
    depthwise_sums<S, SIGNED, QUADS, SHIFT>(a.rows + p * 4 * a.quads, a.quads, channel, a.scratch, acc, window);
    char* out = e.out + p * e.stride + channel;
    if (general != nullptr) {
      depthwise_general<S, SHIFT>(acc, window, general, e, p, channel);
    } else if (any) {
      char* const from = e.out + (p * e.stride + channel) * (e.out_dtype == kF32 ? 4 : 1);
      depthwise_store_any<S, SHIFT>(acc, window, constants, e, from, e.channels - channel);
    } else if (e.out_dtype == kS8) {
      depthwise_store<S, true, SHIFT>(acc, window, constants, lo, out, e.channels - channel);
    } else {
      depthwise_store<S, false, SHIFT>(acc, window, constants, lo, out, e.channels - channel);
    }
  }
}

// As many channels from `channel` on as whole vectors fit; returns the next channel.
template <class S>
int64_t depthwise_vectors(const DepthwisePanel& a, int64_t channel) {
  for (; channel + S::kBytes <= a.blocks * kBlock; channel += S::kBytes) {
    if (a.epilogue.shift != nullptr) {
      (a.x_signed ? depthwise_channels<S, true, 0, true> : depthwise_channels<S, false, 0, true>)(a, channel);
    } else if (a.quads == 3) {
      (a.x_signed ? depthwise_channels<S, true, 3, false> : depthwise_channels<S, false, 3, false>)(a, channel);
    } else {
      (a.x_signed ? depthwise_channels<S, true, 0, false> : depthwise_channels<S, false, 0, false>)(a, channel);
    }
  }
  return channel;
}

}  // namespace
}  // namespace cnncomp
