// Reading and writing the lanes of a register as a C++ type.
#pragma once

#include "machine.h"

namespace ptx {

using half = _Float16;

struct bfloat {  // as bits; arithmetic goes through float
  uint16_t bits;
};

inline float to_float(bfloat b) {
  const uint32_t u = static_cast<uint32_t>(b.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline bfloat to_bfloat(float f) {  // rounds half to even
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}

template <typename To, typename From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_of copies bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename F>
inline void each(uint32_t mask, F f) {
  if (mask == kFull) {
#pragma GCC ivdep
    for (int i = 0; i < kLanes; ++i) f(i);
  } else {
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
  }
}

// A source operand: its low bits where the register is wider, zero-extended where it is narrower.
template <typename T>
struct Source {
  const T* data;
  T own[kLanes];

  Source(Warp& w, const Operand& o) {
    constexpr int kBits = 8 * sizeof(T);
    if (o.width == kBits) {
      data = w.at_slot<T>(o.slot);
      return;
    }
    data = own;
    for (int i = 0; i < kLanes; ++i) {
      uint64_t bits = 0;
      if (o.width == 64) bits = w.at_slot<uint64_t>(o.slot)[i];
      else if (o.width == 32) bits = w.at_slot<uint32_t>(o.slot)[i];
      else if (o.width == 16) bits = w.at_slot<uint16_t>(o.slot)[i];
      else bits = w.predicate(o.slot) >> i & 1;
      std::memcpy(&own[i], &bits, sizeof(T));
    }
  }
  T operator[](int i) const { return data[i]; }
};

// A destination of the same width or wider; signed integers are sign-extended, all others zero-extended.
template <typename T>
struct Target {
  Warp& w;
  const Operand& o;
  uint32_t mask;
  T* data;
  T own[kLanes];

  Target(Warp& w, const Operand& o, uint32_t mask) : w(w), o(o), mask(mask) {
    data = o.width == static_cast<int>(8 * sizeof(T)) ? w.at_slot<T>(o.slot) : own;
  }
  ~Target() noexcept(false) {
    if (data != own) return;
    for (uint32_t m = mask; m; m &= m - 1) {
      const int i = __builtin_ctz(m);
      uint64_t bits = 0;
      if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) bits = static_cast<uint64_t>(static_cast<int64_t>(own[i]));
      else std::memcpy(&bits, &own[i], sizeof(T));
      if (o.width == 64) w.at_slot<uint64_t>(o.slot)[i] = bits;
      else if (o.width == 32) w.at_slot<uint32_t>(o.slot)[i] = static_cast<uint32_t>(bits);
      else if (o.width == 16) w.at_slot<uint16_t>(o.slot)[i] = static_cast<uint16_t>(bits);
      else w.predicate(o.slot) = (w.predicate(o.slot) & ~(1u << i)) | static_cast<uint32_t>(bits & 1) << i;
    }
  }
  T& operator[](int i) { return data[i]; }
};

inline void write_predicate(Warp& w, const Operand& o, uint32_t value, uint32_t mask) {
  uint32_t& p = w.predicate(o.slot);
  p = (p & ~mask) | (value & mask);
}

// Flags that Python passes as the last int of arithmetic instructions.
enum Flag { kSaturate = 1, kFlush = 2, kNanFlag = 4, kCarryOut = 8, kCarryIn = 16 };

inline float flush(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.0f, x) : x; }

// Lanes that a .sync instruction names must all be here. Those that are parked wait for the others; where none can come any
// more, the warp has diverged for good.
inline bool together(Warp& w, uint32_t mask, uint32_t members) {
  const uint32_t wanted = members & w.live;
  if ((mask & wanted) == wanted) return true;
  if (w.forced) fail(kBarrier, "a warp-wide instruction in a warp that has diverged", __builtin_ctz(wanted & ~mask));
  w.event = kPark;
  return false;
}
inline void whole_warp(const Warp&, uint32_t mask) {
  if (mask != kFull) fail(kBarrier, "an .aligned instruction in a warp of which not all lanes take part");
}

}  // namespace ptx
