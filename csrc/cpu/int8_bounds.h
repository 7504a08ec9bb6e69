// What bounds the products of bytes: the range of each channel of 8-bit pixels, and weights that are small enough for any inputs.
// Included by the int8 translation units of each instruction set; used where sums of two products saturate.
#pragma once

#include <cstdint>

namespace cnncomp {
namespace {

// The least and the largest of each byte of `count` vectors that lie `stride` bytes apart.
template <class S>
void vector_range(const uint8_t* x, int64_t count, int64_t stride, typename S::Int flips, uint8_t* least, uint8_t* most) {
  const auto zero = S::set(0), top = S::set(-1);
  auto lo = top, hi = zero;
  for (int64_t i = 0; i < count; i++) {
    const auto v = S::bit_xor(S::load(x + i * stride), flips);
    lo = S::template clamp_bytes<false>(v, zero, lo);
    hi = S::template clamp_bytes<false>(v, hi, top);
  }
  S::store(least, lo);
  S::store(most, hi);
}

// Of pixels narrower than a vector several are taken as one. Rows: how many of these a whole vector can be read from.
template <class S>
struct NarrowPixels {
  int64_t width, rows;
  NarrowPixels(int64_t pixels, int64_t c)
      : width(S::kBytes / c * c), rows(pixels * c < S::kBytes ? 0 : (pixels * c - S::kBytes) / width + 1) {}
};

template <class S>
void channel_range(const uint8_t* x, int64_t pixels, int64_t c, uint8_t flip, uint8_t* least, uint8_t* most) {
  const auto flips = S::set(static_cast<int32_t>(flip * 0x01010101u));
  if (c >= S::kBytes) {
    for (int64_t at = 0; at < c; at += S::kBytes) {
      const int64_t from = at < c - S::kBytes ? at : c - S::kBytes;
      vector_range<S>(x + from, pixels, c, flips, least + from, most + from);
    }
    return;
  }
  const NarrowPixels<S> narrow(pixels, c);
  uint8_t lows[S::kBytes], highs[S::kBytes];
  vector_range<S>(x, narrow.rows, narrow.width, flips, lows, highs);
  const auto meet = [&](int64_t channel, uint8_t lo, uint8_t hi) {
    if (lo < least[channel]) least[channel] = lo;
    if (hi > most[channel]) most[channel] = hi;
  };
  __builtin_memset(least, 255, c);
  __builtin_memset(most, 0, c);
  for (int64_t j = 0; j < narrow.width; j++) meet(j % c, lows[j], highs[j]);
  for (int64_t i = narrow.rows * narrow.width; i < pixels * c; i++) meet(i % c, x[i] ^ flip, x[i] ^ flip);
}

template <class S>
void lower_channels(const uint8_t* x, int64_t pixels, int64_t c, uint8_t flip, const uint8_t* least, uint8_t* to) {
  const auto flips = S::set(static_cast<int32_t>(flip * 0x01010101u));
  const auto lower = [&](int64_t at, typename S::Int offset) {
    S::store(to + at, S::sub_bytes(S::bit_xor(S::load(x + at), flips), offset));
  };
  if (c >= S::kBytes) {
    for (int64_t i = 0; i < pixels * c; i += c) {
      for (int64_t at = 0; at < c - S::kBytes; at += S::kBytes) lower(i + at, S::load(least + at));
      lower(i + c - S::kBytes, S::load(least + c - S::kBytes));
    }
    return;
  }
  const NarrowPixels<S> narrow(pixels, c);
  uint8_t taken[S::kBytes];
  for (int64_t j = 0; j < S::kBytes; j++) taken[j] = least[j % c];
  const auto offset = S::load(taken);
  // What a vector writes beyond its pixels, the next one writes over.
  for (int64_t i = 0; i < narrow.rows; i++) lower(i * narrow.width, offset);
  for (int64_t i = narrow.rows * narrow.width; i < pixels * c; i++) to[i] = static_cast<uint8_t>((x[i] ^ flip) - least[i % c]);
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
