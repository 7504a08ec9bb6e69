// What bounds the products of bytes: the range of each channel of 8-bit pixels, and weights that are small enough for any inputs.
// Included by the int8 translation units of each instruction set; used where sums of two products saturate.
#pragma once

#include <cstdint>

namespace cnncomp {
namespace {

// Pixels of c channels that fill whole vectors together.
template <class S>
int64_t pixels_of_vectors(int64_t c) {
  int64_t a = c, b = S::kBytes;
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return S::kBytes / a;
}

template <class S>
void channel_range(const uint8_t* x, int64_t pixels, int64_t c, uint8_t flip, uint8_t* least, uint8_t* most) {
  const auto flips = S::set(static_cast<int32_t>(flip * 0x01010101u)), zero = S::set(0), top = S::set(-1);
  const int64_t step = pixels_of_vectors<S>(c) * c, count = pixels * c / step;
  const auto meet = [&](int64_t channel, uint8_t lo, uint8_t hi) {
    if (lo < least[channel]) least[channel] = lo;
    if (hi > most[channel]) most[channel] = hi;
  };
  __builtin_memset(least, 255, c);
  __builtin_memset(most, 0, c);
  for (int64_t at = 0; at < step; at += S::kBytes) {
    auto lo = top, hi = zero;
    for (int64_t i = 0; i < count; i++) {
      const auto v = S::bit_xor(S::load(x + i * step + at), flips);
      lo = S::template clamp_bytes<false>(v, zero, lo);
      hi = S::template clamp_bytes<false>(v, hi, top);
    }
    uint8_t lows[S::kBytes], highs[S::kBytes];
    S::store(lows, lo);
    S::store(highs, hi);
    for (int j = 0; j < S::kBytes; j++) meet((at + j) % c, lows[j], highs[j]);
  }
  for (int64_t i = count * step; i < pixels * c; i++) meet(i % c, x[i] ^ flip, x[i] ^ flip);
}

template <class S>
void lower_channels(const uint8_t* x, int64_t pixels, int64_t c, uint8_t flip, const uint8_t* least, uint8_t* to) {
  const auto flips = S::set(static_cast<int32_t>(flip * 0x01010101u));
  const int64_t step = pixels_of_vectors<S>(c) * c, count = pixels * c / step;
  for (int64_t at = 0; at < step; at += S::kBytes) {
    uint8_t taken[S::kBytes];
    for (int j = 0; j < S::kBytes; j++) taken[j] = least[(at + j) % c];
    const auto offset = S::load(taken);
    for (int64_t i = 0; i < count; i++) {
      const int64_t byte = i * step + at;
      S::store(to + byte, S::sub_bytes(S::bit_xor(S::load(x + byte), flips), offset));
    }
  }
  for (int64_t i = count * step; i < pixels * c; i++) to[i] = static_cast<uint8_t>((x[i] ^ flip) - least[i % c]);
}

template <class S>
bool quads_bounded(const int8_t* quads, int64_t count) {
  auto beyond = S::set(0);
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) beyond = S::bit_or(beyond, S::pairs_beyond(S::set(-1), S::load(quads + 4 * i)));
  int8_t rest[S::kBytes] = {};
  for (int64_t j = 4 * i; j < 4 * count; j++) rest[j - 4 * i] = quads[j];
  return S::none(S::bit_or(beyond, S::pairs_beyond(S::set(-1), S::load(rest))));
}

}  // namespace
}  // namespace cnncomp
