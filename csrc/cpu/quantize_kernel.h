// Floats to 8 bit, and the maximum of 8-bit rows. Included by the int8 translation units of each instruction set.
#pragma once

#include <type_traits>

#include "int8_kernels.h"

namespace cnncomp {
namespace {

template <class S>
inline typename S::Int quantize_vector(const float* x, const QuantizeRange& range) {
  const auto t = S::mul(S::load_float(x), S::set_float(range.inv_scale));
  // max gives its second operand where the first is NaN: NaN becomes lo.
  return S::round(S::min(S::max(t, S::set_float(range.lo)), S::set_float(range.hi)));
}

template <class S, bool SIGNED>
inline void quantize_block(const float* x, const QuantizeRange& range, uint8_t* out) {
  typename S::Int q[16 / S::kLanes];
  for (int v = 0; v < 16 / S::kLanes; v++) q[v] = quantize_vector<S>(x + v * S::kLanes, range);
  S::template store_bytes<SIGNED>(out, q);
}

template <class S>
void quantize_flat(const float* x, int64_t count, const QuantizeRange& range, uint8_t* out) {
  const auto block = range.lo < 0 ? quantize_block<S, true> : quantize_block<S, false>;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) block(x + i, range, out + i);
  if (i < count) {
    float last[16] = {};
    uint8_t bytes[16];
    __builtin_memcpy(last, x + i, (count - i) * sizeof(float));
    block(last, range, bytes);
    __builtin_memcpy(out + i, bytes, count - i);
  }
}

// Four planes (or fewer) and 16 pixels: one 32-bit quad of channels for each pixel.
template <class S>
inline void quantize_quads(const float* x, int64_t plane_stride, int64_t planes, const QuantizeRange& range,
                           int32_t (&quads)[16]) {
  const auto low_byte = S::set(255);
  for (int v = 0; v < 16 / S::kLanes; v++) {
    const auto plane = [&](int64_t c) {
      return c < planes ? S::bit_and(quantize_vector<S>(x + c * plane_stride + v * S::kLanes, range), low_byte) : S::set(0);
    };
    const auto ab = S::bit_or(plane(0), S::template shift_left<8>(plane(1)));
    const auto cd = S::bit_or(plane(2), S::template shift_left<8>(plane(3)));
    S::store(quads + v * S::kLanes, S::bit_or(ab, S::template shift_left<16>(cd)));
  }
}

template <class S>
void quantize_planes(const float* x, int64_t plane_stride, int64_t c, int64_t pixels, const QuantizeRange& range,
                     uint8_t* out) {
  const uint8_t* end = out + pixels * c;
  for (int64_t p = 0; p < pixels; p += 16) {
    const int64_t count = pixels - p < 16 ? pixels - p : 16;
    // The last channels first, pixels in ascending order: a quad that reaches past its pixel's channels spoils the
    // following pixel, which is written afterwards.
    for (int64_t channel = (c - 1) / 4 * 4; channel >= 0; channel -= 4) {
      const int64_t planes = c - channel < 4 ? c - channel : 4;
      const float* src = x + channel * plane_stride + p;
      int64_t stride = plane_stride;
      float last[4 * 16] = {};
      if (count < 16) {
        for (int64_t i = 0; i < planes; i++) __builtin_memcpy(last + 16 * i, src + i * stride, count * sizeof(float));
        src = last, stride = 16;
      }
      alignas(64) int32_t quads[16];
      quantize_quads<S>(src, stride, planes, range, quads);
      uint8_t* dst = out + p * c + channel;
      if constexpr (requires { S::store_triples(dst, S::set(0)); }) {
        if (c == 3 && count == 16 && end - dst >= 52) {
          for (int v = 0; v < 16 / S::kLanes; v++) S::store_triples(dst + 3 * v * S::kLanes, S::load(quads + v * S::kLanes));
          continue;
        }
      }
      for (int64_t i = 0; i < count; i++, dst += c) {
        if (end - dst >= 4) {
          __builtin_memcpy(dst, quads + i, 4);
        } else {
          __builtin_memcpy(dst, quads + i, planes);
        }
      }
    }
  }
}

template <class S, bool SIGNED>
void max_rows(const uint8_t* const* rows, int64_t count, int64_t c, uint8_t* out) {
  const auto top = S::set(SIGNED ? 0x7f7f7f7f : -1);
  int64_t at = 0;
  for (; at + S::kBytes <= c; at += S::kBytes) {
    auto best = S::load(rows[0] + at);
    for (int64_t i = 1; i < count; i++) best = S::template clamp_bytes<SIGNED>(S::load(rows[i] + at), best, top);
    S::store(out + at, best);
  }
  using T = std::conditional_t<SIGNED, int8_t, uint8_t>;
  T* __restrict best = reinterpret_cast<T*>(out);
  __builtin_memcpy(out + at, rows[0] + at, c - at);
  for (int64_t i = 1; i < count; i++) {
    const T* __restrict row = reinterpret_cast<const T*>(rows[i]);
    for (int64_t j = at; j < c; j++) best[j] = row[j] > best[j] ? row[j] : best[j];
  }
}

}  // namespace
}  // namespace cnncomp
