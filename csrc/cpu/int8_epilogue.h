// From int32 accumulators to the output. Included by the int8 translation units of each instruction set.
#pragma once

#include "int8_kernels.h"

namespace cnncomp {
namespace {

enum Residual : int { kResidualU8 = 0, kResidualS8 = 1, kResidualF32 = 2, kNoResidual = 3 };

// The epilogue's steps on one vector; each is rounded on its own. A NaN stays NaN, as in torch.
template <class S>
inline typename S::Float scale_and_shift(typename S::Int acc, typename S::Float scale, typename S::Float bias) {
  return S::add(S::mul(S::to_float(acc), scale), bias);
}

template <class S>
inline typename S::Float clamp(typename S::Float t, typename S::Float lo, typename S::Float hi) {
  return S::min(hi, S::max(lo, t));
}

template <class S, Residual RESIDUAL>
inline typename S::Float load_residual(const char* p, int vector) {
  if constexpr (RESIDUAL == kResidualF32) {
    return S::load_float(reinterpret_cast<const float*>(p) + vector * S::kLanes);
  } else {
    const auto* bytes = reinterpret_cast<const uint8_t*>(p) + vector * S::kLanes;
    return S::to_float(RESIDUAL == kResidualS8 ? S::load_s8(bytes) : S::load_u8(bytes));
  }
}

// Channels of one pixel, V vectors of them.
template <class S, Dtype OUT, int V>
inline void store_channels(char* p, const typename S::Float (&t)[V]) {
  if constexpr (OUT == kF32) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) S::store_float(reinterpret_cast<float*>(p) + v * S::kLanes, t[v]);
  } else {
    typename S::Int q[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) q[v] = S::round(t[v]);
    S::template store_bytes<OUT == kS8>(reinterpret_cast<uint8_t*>(p), q);
  }
}

// A vector of the term that weights w = scale * q + shift add: shift[k] * sum of the inputs under the window.
template <class S>
inline typename S::Float add_window(typename S::Float t, typename S::Float shift, typename S::Int window) {
  return S::add(t, S::mul(shift, S::to_float(window)));
}

// t / (1 + exp(-t)) by the additions and multiplications of cnncomp/ops/reference.py, each rounded on its own: the same bits.
template <class S>
inline __attribute__((always_inline)) typename S::Float silu(typename S::Float t) {
  const auto of = [](float v) __attribute__((always_inline)) { return S::set_float(v); };
  const auto magnitude = S::as_float(S::bit_and(S::as_int(t), S::set(INT32_MAX)));
  const auto y = S::max(of(-126.0f), S::mul(magnitude, of(-1.44269504f)));
  const auto round = of(12582912.0f);  // 1.5 * 2^23: leaves no bits for a fraction
  const auto shifted = S::add(y, round), f = S::sub(y, S::sub(shifted, round));
  constexpr float kPolynomial[] = {1.32647273e-3f, 9.67151299e-3f, 5.55073358e-2f, 2.40222424e-1f, 6.93147004e-1f, 1.0f};
  auto z = of(kPolynomial[0]);
#pragma GCC unroll 5
  for (int i = 1; i < 6; i++) z = S::add(S::mul(z, f), of(kPolynomial[i]));
  z = S::as_float(S::add_int(S::as_int(z), S::template shift_left<23>(S::as_int(shifted))));
  const auto one = of(1.0f), d = S::add(one, z);
  auto inverse = S::add(of(1.41176471f), S::mul(d, of(-4.70588235e-1f)));
#pragma GCC unroll 3
  for (int i = 0; i < 3; i++) inverse = S::add(inverse, S::mul(inverse, S::sub(one, S::mul(d, inverse))));
  // Of negative t the other side of the curve, chosen by the sign.
  const auto other = S::bit_xor(S::as_int(S::mul(z, inverse)), S::as_int(inverse));
  const auto negative = S::template shift_right<31>(S::as_int(t));
  return S::mul(t, S::as_float(S::bit_xor(S::as_int(inverse), S::bit_and(other, negative))));
}

template <class S>
inline __attribute__((always_inline)) typename S::Float hardswish(typename S::Float t) {
  const auto gate = clamp<S>(S::add(t, S::set_float(3.0f)), S::set_float(0.0f), S::set_float(6.0f));
  return S::mul(t, S::mul(gate, S::set_float(1.66666672e-1f)));
}

// The nonlinearity, and the factor behind it.
template <class S, int V>
inline __attribute__((always_inline)) void activate(typename S::Float (&t)[V], const Int8Epilogue& e) {
  const auto factor = S::set_float(e.out_factor);
  if (e.nonlinearity == kSilu) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) t[v] = S::mul(silu<S>(t[v]), factor);
  } else {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) t[v] = S::mul(hardswish<S>(t[v]), factor);
  }
}

// BLOCKS blocks of 16 channels of some pixels. acc: acc_stride int32 from pixel to pixel. `pixel` and `channel` count from
// those that e's pointers are of. Channels beyond the last go to spare memory.
template <class S, int BLOCKS, Dtype OUT, Residual RESIDUAL, bool SHIFT>
void epilogue(const int32_t* acc, int64_t acc_stride, int64_t pixels, const Int8Epilogue& e, int64_t pixel,
              int64_t channel) {
  constexpr int kChannels = BLOCKS * kBlock, V = kChannels / S::kLanes;
  constexpr int kOutBytes = OUT == kF32 ? 4 : 1, kResidualBytes = RESIDUAL == kResidualF32 ? 4 : 1;
  const int64_t valid = e.channels - channel < kChannels ? e.channels - channel : kChannels;
  if (valid <= 0) return;
  typename S::Float scale[V], bias[V], hi[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) {
    scale[v] = S::load_float(e.scale + channel + v * S::kLanes);
    bias[v] = S::load_float(e.bias + channel + v * S::kLanes);
    hi[v] = S::load_float(e.hi + channel + v * S::kLanes);
  }
  const auto lo = S::set_float(e.lo), residual_scale = S::set_float(e.residual_scale);
  char* out = e.out + (pixel * e.stride + channel) * kOutBytes;
  const char* residual = e.residual + (pixel * e.stride + channel) * kResidualBytes;
  for (int64_t m = 0; m < pixels; m++, out += e.stride * kOutBytes, acc += acc_stride) {
    alignas(64) char spare[kChannels * 4];
    typename S::Float t[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) t[v] = scale_and_shift<S>(S::load(acc + v * S::kLanes), scale[v], bias[v]);
    if constexpr (SHIFT) {
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        const auto window = e.window_per_channel ? S::load(e.window + v * S::kLanes) : S::set(e.window[pixel + m]);
        t[v] = add_window<S>(t[v], S::load_float(e.shift + channel + v * S::kLanes), window);
      }
    }
    if constexpr (RESIDUAL != kNoResidual) {
      const char* from = residual;
      if (valid < kChannels) {
        __builtin_memset(spare, 0, sizeof(spare));
        __builtin_memcpy(spare, residual, valid * kResidualBytes);
        from = spare;
      }
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) t[v] = S::add(t[v], S::mul(load_residual<S, RESIDUAL>(from, v), residual_scale));
      residual += e.stride * kResidualBytes;
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) t[v] = clamp<S>(t[v], lo, hi[v]);
    if (valid == kChannels) {
      store_channels<S, OUT>(out, t);
    } else {
      store_channels<S, OUT>(spare, t);
      __builtin_memcpy(out, spare, valid * kOutBytes);
    }
  }
}

// For hi_bytes of BLOCKS blocks: repeated, so that 64 can be loaded from the byte of any block on.
template <int BLOCKS>
struct ByteBounds {
  alignas(64) uint8_t hi[(BLOCKS + 3) * kBlock];
  int32_t lo;

  explicit ByteBounds(const Int8Epilogue& e) : lo(static_cast<int32_t>(e.lo_byte * 0x01010101u)) {
    if (e.hi_bytes == nullptr) return;
    for (int i = 0; i < BLOCKS + 3; i++) __builtin_memcpy(hi + i * kBlock, e.hi_bytes + i % BLOCKS * kBlock, kBlock);
  }
};

__attribute__((noinline)) void store_some(char* out, const char* bytes, int64_t count) {
  int64_t done = 0;
  for (; done + 8 <= count; done += 8) __builtin_memcpy(out + done, bytes + done, 8);
  for (; done < count; done++) out[done] = bytes[done];
}

// COUNT times 16 channels from chunk I of `bytes` on, of which the first `valid` are wanted.
template <class S, int I, int COUNT>
inline void store_chunks(char* out, typename S::Int bytes, int64_t valid) {
  if (valid >= COUNT * kBlock) return S::template store_part<I, COUNT>(out, bytes);
  alignas(64) char spare[COUNT * kBlock];
  S::template store_part<I, COUNT>(spare, bytes);
  store_some(out, spare, valid);
}

// The epilogue of a register tile up to the clamp.
template <class S, int PIXELS, int V>
inline __attribute__((always_inline)) void scale_tile(const typename S::Int (&acc)[PIXELS][V], const Int8Epilogue& e,
                                                      int64_t pixel, typename S::Float (&t)[PIXELS][V]) {
#pragma GCC unroll 16
  for (int v = 0; v < V; v++) {
    const auto scale = S::load_float(e.scale + v * S::kLanes), bias = S::load_float(e.bias + v * S::kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; m++) t[m][v] = scale_and_shift<S>(acc[m][v], scale, bias);
  }
  if (e.residual == nullptr) return;
  const auto r = S::set_float(e.residual_scale);
  const int64_t stride = e.residual_dtype == kF32 ? 4 * e.stride : e.stride;
  const char* residual = e.residual + pixel * stride;
#pragma GCC unroll 16
  for (int m = 0; m < PIXELS; m++, residual += stride) {
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      const auto x = e.residual_dtype == kU8   ? load_residual<S, kResidualU8>(residual, v)
                     : e.residual_dtype == kS8 ? load_residual<S, kResidualS8>(residual, v)
                                               : load_residual<S, kResidualF32>(residual, v);
      t[m][v] = S::add(t[m][v], S::mul(x, r));
    }
  }
}

// A register tile's outputs; no window, and floats in whole blocks only. Rounding keeps the order of numbers: where e.bytes,
// rounding, saturating to 8 bit and clamping to rounded bounds is the same as the epilogue's clamp before it, and bytes are
// four to a lane.
template <class S, int BLOCKS, int PIXELS>
inline __attribute__((always_inline)) void store_tile(
    const typename S::Int (&acc)[PIXELS][BLOCKS * kBlock / S::kLanes], const Int8Epilogue& e,
    const ByteBounds<BLOCKS>& bounds, int64_t pixel) {
  constexpr int V = BLOCKS * kBlock / S::kLanes, kChunks = S::kLanes / 4;  // of 16 channels, in four vectors
  constexpr int kRun = BLOCKS % kChunks == 0 ? kChunks : BLOCKS == 2 ? 2 : 1;  // chunks that lie together
  typename S::Float t[PIXELS][V];
  scale_tile<S, PIXELS, V>(acc, e, pixel, t);
  if (!e.bytes) {
    const auto lo = S::set_float(e.lo);
#pragma GCC unroll 16
    for (int v = 0; v < V; v++)
#pragma GCC unroll 16
      for (int m = 0; m < PIXELS; m++) t[m][v] = clamp<S>(t[m][v], lo, S::load_float(e.hi + v * S::kLanes));
  }
  if (e.out_dtype == kF32) {
    float* out = reinterpret_cast<float*>(e.out) + pixel * e.stride;
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; m++, out += e.stride)
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) S::store_float(out + v * S::kLanes, t[m][v]);
    return;
  }
  char* const out = e.out + pixel * e.stride;
#pragma GCC unroll 16
  for (int first = 0; first < PIXELS * V; first += 4) {
    typename S::Int q[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const int f = first + i < PIXELS * V ? first + i : first;
      q[i] = S::round(t[f / V][f % V]);
    }
    const auto store = [&]<int I>(auto bytes) __attribute__((always_inline)) {
      const int chunk = first / 4 * kChunks + I;
      if (I % kRun == 0 && chunk < PIXELS * BLOCKS)
        store_chunks<S, I, kRun>(out + chunk / BLOCKS * e.stride + chunk % BLOCKS * kBlock, bytes,
                                 e.channels - chunk % BLOCKS * kBlock);
    };
    auto bytes = S::in_order(e.out_dtype == kS8 ? S::template pack<true>(q[0], q[1], q[2], q[3])
                                                : S::template pack<false>(q[0], q[1], q[2], q[3]));
    if (e.hi_bytes != nullptr) {
      const auto lo = S::set(bounds.lo), hi = S::load(bounds.hi + first / 4 * kChunks % BLOCKS * kBlock);
      bytes = e.out_dtype == kS8 ? S::template clamp_bytes<true>(bytes, lo, hi) : S::template clamp_bytes<false>(bytes, lo, hi);
    }
    store.template operator()<0>(bytes);
    if constexpr (kChunks > 1) store.template operator()<1>(bytes);
    if constexpr (kChunks > 2) store.template operator()<2>(bytes);
    if constexpr (kChunks > 2) store.template operator()<3>(bytes);
  }
}

// The same with a nonlinearity, for any outputs and residuals: what it takes hides that they are told apart for each pixel.
template <class S, int BLOCKS>
void activated_epilogue(const int32_t* acc, int64_t acc_stride, int64_t pixels, const Int8Epilogue& e, int64_t pixel,
                        int64_t channel) {
  constexpr int kChannels = BLOCKS * kBlock, V = kChannels / S::kLanes;
  const int64_t valid = e.channels - channel < kChannels ? e.channels - channel : kChannels;
  if (valid <= 0) return;
  const int64_t out_bytes = e.out_dtype == kF32 ? 4 : 1, residual_bytes = e.residual_dtype == kF32 ? 4 : 1;
  const auto lo = S::set_float(e.lo), residual_scale = S::set_float(e.residual_scale);
  for (int64_t m = 0; m < pixels; m++, acc += acc_stride) {
    const int64_t at = (pixel + m) * e.stride + channel;
    alignas(64) char spare[kChannels * 4];
    typename S::Float t[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const int64_t c = channel + v * S::kLanes;
      t[v] = scale_and_shift<S>(S::load(acc + v * S::kLanes), S::load_float(e.scale + c), S::load_float(e.bias + c));
      if (e.shift != nullptr) {
        const auto window = e.window_per_channel ? S::load(e.window + v * S::kLanes) : S::set(e.window[pixel + m]);
        t[v] = add_window<S>(t[v], S::load_float(e.shift + c), window);
      }
    }
    if (e.residual != nullptr) {
      const char* from = e.residual + at * residual_bytes;
      if (valid < kChannels) {
        __builtin_memset(spare, 0, sizeof(spare));
        __builtin_memcpy(spare, from, valid * residual_bytes);
        from = spare;
      }
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        const auto x = e.residual_dtype == kU8   ? load_residual<S, kResidualU8>(from, v)
                       : e.residual_dtype == kS8 ? load_residual<S, kResidualS8>(from, v)
                                                 : load_residual<S, kResidualF32>(from, v);
        t[v] = S::add(t[v], S::mul(x, residual_scale));
      }
    }
    activate<S>(t, e);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) t[v] = clamp<S>(t[v], lo, S::load_float(e.hi + channel + v * S::kLanes));
    char* const out = e.out + at * out_bytes;
    char* const to = valid == kChannels ? out : spare;
    if (e.out_dtype == kF32) {
      store_channels<S, kF32>(to, t);
    } else if (e.out_dtype == kS8) {
      store_channels<S, kS8>(to, t);
    } else {
      store_channels<S, kU8>(to, t);
    }
    if (valid < kChannels) __builtin_memcpy(out, spare, valid * out_bytes);
  }
}

// By four vectors, or fewer, at a time: enough that none waits for the one before, and they stay in registers.
template <class S, int BLOCKS>
void epilogue_with_nonlinearity(const int32_t* acc, int64_t acc_stride, int64_t pixels, const Int8Epilogue& e, int64_t pixel,
                                int64_t channel) {
  constexpr int kFull = S::kLanes / 4, kTogether = BLOCKS <= kFull ? BLOCKS : BLOCKS % kFull == 0 ? kFull : 1;
  for (int b = 0; b < BLOCKS; b += kTogether)
    activated_epilogue<S, kTogether>(acc + b * kBlock, acc_stride, pixels, e, pixel, channel + b * kBlock);
}

using EpilogueFn = void (*)(const int32_t*, int64_t, int64_t, const Int8Epilogue&, int64_t, int64_t);

template <class S, int BLOCKS, bool SHIFT>
EpilogueFn epilogue_in_table(const Int8Epilogue& e) {
  static constexpr EpilogueFn table[3][4] = {
      {epilogue<S, BLOCKS, kU8, kResidualU8, SHIFT>, epilogue<S, BLOCKS, kU8, kResidualS8, SHIFT>,
       epilogue<S, BLOCKS, kU8, kResidualF32, SHIFT>, epilogue<S, BLOCKS, kU8, kNoResidual, SHIFT>},
      {epilogue<S, BLOCKS, kS8, kResidualU8, SHIFT>, epilogue<S, BLOCKS, kS8, kResidualS8, SHIFT>,
       epilogue<S, BLOCKS, kS8, kResidualF32, SHIFT>, epilogue<S, BLOCKS, kS8, kNoResidual, SHIFT>},
      {epilogue<S, BLOCKS, kF32, kResidualU8, SHIFT>, epilogue<S, BLOCKS, kF32, kResidualS8, SHIFT>,
       epilogue<S, BLOCKS, kF32, kResidualF32, SHIFT>, epilogue<S, BLOCKS, kF32, kNoResidual, SHIFT>}};
  return table[e.out_dtype][e.residual == nullptr ? kNoResidual : static_cast<Residual>(e.residual_dtype)];
}

template <class S, int BLOCKS>
EpilogueFn epilogue_of(const Int8Epilogue& e) {
  if (e.nonlinearity != kNone) return epilogue_with_nonlinearity<S, BLOCKS>;
  return (e.shift == nullptr ? epilogue_in_table<S, BLOCKS, false> : epilogue_in_table<S, BLOCKS, true>)(e);
}

}  // namespace
}  // namespace cnncomp
