// Moves and conversions. PTX ISA 9.7.9 (mov, cvt, cvta, cvt.pack).

#include <cmath>
#include <limits>
#include <type_traits>

#include "lanes.h"

namespace ptx {
namespace {

enum Rounding { kNone, kNearest, kZero, kDown, kUp, kNearestInt, kZeroInt, kDownInt, kUpInt, kNearestAway };

template <typename T>
void move(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]);
  Target<T> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = a[l]; });
}
void move_predicate(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  write_predicate(w, i.ops[0], w.predicate(i.ops[1].slot), mask);
}

// {d0, d1, ..} = a: the lowest bits first. ints: bits of a part.
void split(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<uint64_t> a(w, i.ops.back());
  uint64_t copy[kLanes];
  for (int l = 0; l < kLanes; ++l) copy[l] = a[l];
  const int width = static_cast<int>(i.ints[0]);
  for (size_t k = 0; k + 1 < i.ops.size(); ++k) {
    auto put = [&](auto zero) {
      Target<decltype(zero)> d(w, i.ops[k], mask);
      each(mask, [&](int l) { d[l] = static_cast<decltype(zero)>(copy[l] >> (width * k)); });
    };
    if (width == 8) put(uint8_t{});
    else if (width == 16) put(uint16_t{});
    else put(uint32_t{});
  }
}
void gather(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const int width = static_cast<int>(i.ints[0]);
  uint64_t all[kLanes] = {};
  for (size_t k = 1; k < i.ops.size(); ++k) {
    const Source<uint64_t> a(w, i.ops[k]);
    for (int l = 0; l < kLanes; ++l) all[l] |= (a[l] & ((1ull << width) - 1)) << (width * (k - 1));
  }
  auto put = [&](auto zero) {
    Target<decltype(zero)> d(w, i.ops[0], mask);
    each(mask, [&](int l) { d[l] = static_cast<decltype(zero)>(all[l]); });
  };
  if (i.ints[1] == 64) put(uint64_t{});
  else if (i.ints[1] == 32) put(uint32_t{});
  else put(uint16_t{});
}

double rounded(double x, int64_t mode) {
  switch (mode) {
    case kNearestInt: return std::nearbyint(x);
    case kZeroInt: return std::trunc(x);
    case kDownInt: return std::floor(x);
    case kUpInt: return std::ceil(x);
    default: return x;
  }
}
// Directed rounding of the double x to F, for cvt.rz, .rm, .rp.
template <typename F>
F directed(double x, int64_t mode) {
  F r = static_cast<F>(x);
  if constexpr (!std::is_same_v<F, double>) {
    if (mode == kNone || mode == kNearest || std::isnan(x) || static_cast<double>(r) == x) return r;
    using U = std::conditional_t<sizeof(F) == 4, uint32_t, uint16_t>;
    const bool above = static_cast<double>(r) > x;
    const bool want_below = mode == kDown || (mode == kZero && x > 0), want_above = mode == kUp || (mode == kZero && x < 0);
    auto step = [&](int away) { r = bits_of<F>(static_cast<U>(bits_of<U>(r) + away)); };
    if (above && want_below) step(x > 0 ? -1 : 1);
    if (!above && want_above) step(x > 0 ? 1 : -1);
  }
  return r;
}

template <typename T> double as_double(T x) { return static_cast<double>(x); }
template <> double as_double(bfloat x) { return to_float(x); }

// ints: flags, rounding.
template <typename To, typename From>
void convert(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<From> a(w, i.ops[1]);
  Target<To> d(w, i.ops[0], mask);
  const int64_t flags = i.ints[0], mode = i.ints[1];
  constexpr bool kToInt = std::is_integral_v<To>, kFromInt = std::is_integral_v<From>;
  each(mask, [&](int l) {
    if constexpr (kToInt && kFromInt) {
      if (flags & kSaturate) {
        __extension__ using Wide = __int128;
        const Wide x = a[l], low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
        d[l] = static_cast<To>(x < low ? low : x > high ? high : x);
      } else {
        d[l] = static_cast<To>(a[l]);
      }
    } else if constexpr (kToInt) {  // saturates always; NaN gives 0
      double x = as_double(a[l]);
      if (flags & kFlush) x = flush(static_cast<float>(x));
      x = rounded(x, mode);
      constexpr double kLow = static_cast<double>(std::numeric_limits<To>::min());
      const double high = std::ldexp(1.0, std::numeric_limits<To>::digits);
      d[l] = std::isnan(x) ? 0 : x <= kLow ? std::numeric_limits<To>::min() : x >= high ? std::numeric_limits<To>::max() : static_cast<To>(x);
    } else if constexpr (kFromInt) {
      if constexpr (std::is_same_v<To, bfloat>) d[l] = to_bfloat(static_cast<float>(a[l]));
      else if constexpr (std::is_same_v<To, half>) d[l] = directed<half>(static_cast<double>(a[l]), mode);
      else if (mode == kNearest || mode == kNone) d[l] = static_cast<To>(a[l]);  // at once from 64 bits
      else d[l] = directed<To>(static_cast<double>(a[l]), mode);
    } else {
      double x = rounded(as_double(a[l]), mode);
      if (flags & kFlush) x = flush(static_cast<float>(x));
      if (flags & kSaturate) x = x != x || x < 0 ? 0 : x > 1 ? 1 : x;
      if (flags & kNanFlag && x < 0) x = 0;  // .relu
      if constexpr (std::is_same_v<To, bfloat>) {
        const float f = static_cast<float>(x);
        d[l] = mode == kZero && f == f ? bfloat{static_cast<uint16_t>(bits_of<uint32_t>(f) >> 16)} : to_bfloat(f);
      } else {
        d[l] = directed<To>(x, mode);
        if constexpr (std::is_same_v<To, float>)
          if (flags & kFlush) d[l] = flush(d[l]);
      }
    }
  });
}

// cvt.rn.f16x2.f32 d, a, b: a into the upper half.
template <typename To>
void convert_pair(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<float> a(w, i.ops[1]), b(w, i.ops[2]);
  Target<uint32_t> d(w, i.ops[0], mask);
  const int64_t flags = i.ints[0], mode = i.ints[1];
  auto one = [&](float x) {
    if (flags & kNanFlag && x < 0) x = 0;
    if (flags & kSaturate) x = x != x || x < 0 ? 0 : x > 1 ? 1 : x;
    if constexpr (std::is_same_v<To, half>) return bits_of<uint16_t>(directed<half>(x, mode));
    else return mode == kZero && x == x ? static_cast<uint16_t>(bits_of<uint32_t>(x) >> 16) : to_bfloat(x).bits;
  };
  each(mask, [&](int l) { d[l] = static_cast<uint32_t>(one(a[l])) << 16 | one(b[l]); });
}
// To the 10 bits of tf32's fraction: rna rounds ties away from zero, rn to even, rz cuts.
void convert_tf32(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<uint32_t> a(w, i.ops[1]);
  Target<uint32_t> d(w, i.ops[0], mask);
  const int64_t mode = i.ints[1];
  each(mask, [&](int l) {
    uint32_t x = a[l];
    if ((x & 0x7f800000u) != 0x7f800000u) {
      if (mode == kNearestAway) x += 0x1000u;
      else if (mode == kNearest) x += 0xfffu + (x >> 13 & 1);
      x &= ~0x1fffu;
    }
    d[l] = x;
  });
}
// cvt.pack.sat.<to>.s32.b32 d, a, b, c: two saturated values above the low bits of c. ints: bits of a value, signed.
void pack(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<int32_t> a(w, i.ops[1]), b(w, i.ops[2]);
  const Source<uint32_t> c(w, i.ops[3]);
  Target<uint32_t> d(w, i.ops[0], mask);
  const int bits = static_cast<int>(i.ints[0]);
  const int64_t low = i.ints[1] ? -(1ll << (bits - 1)) : 0, high = (1ll << (i.ints[1] ? bits - 1 : bits)) - 1;
  auto one = [&](int64_t x) { return static_cast<uint32_t>((x < low ? low : x > high ? high : x) & ((1ll << bits) - 1)); };
  each(mask, [&](int l) {
    const uint32_t pair = one(a[l]) << bits | one(b[l]);
    d[l] = bits == 16 ? pair : c[l] << (2 * bits) | pair;
  });
}

// cvta: ints: window, to (1: from generic to the space).
void convert_address(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<uint64_t> a(w, i.ops[1]);
  Target<uint64_t> d(w, i.ops[0], mask);
  const uint64_t window = static_cast<uint64_t>(i.ints[0]);
  each(mask, [&](int l) { d[l] = i.ints[1] ? a[l] - window : a[l] + window; });
}
void is_space(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<uint64_t> a(w, i.ops[1]);
  const uint64_t window = static_cast<uint64_t>(i.ints[0]);
  uint32_t r = 0;
  for (int l = 0; l < kLanes; ++l) {
    const bool in = window ? a[l] >= window && a[l] < window + kWindow : a[l] >= kParamWindow + kWindow;
    r |= static_cast<uint32_t>(in) << l;
  }
  write_predicate(w, i.ops[0], r, mask);
}

using Table = std::unordered_map<std::string, Handler>;

template <typename To>
void conversions(Table& t, const std::string& to) {
  auto name = [&](const char* from) { return "cvt." + to + "." + from; };
  t[name("u8")] = convert<To, uint8_t>, t[name("s8")] = convert<To, int8_t>;
  t[name("u16")] = convert<To, uint16_t>, t[name("s16")] = convert<To, int16_t>;
  t[name("u32")] = convert<To, uint32_t>, t[name("s32")] = convert<To, int32_t>;
  t[name("u64")] = convert<To, uint64_t>, t[name("s64")] = convert<To, int64_t>;
  t[name("f16")] = convert<To, half>, t[name("bf16")] = convert<To, bfloat>;
  t[name("f32")] = convert<To, float>, t[name("f64")] = convert<To, double>;
}

}  // namespace

void register_convert(Table& t) {
  t["mov.8"] = move<uint8_t>, t["mov.16"] = move<uint16_t>, t["mov.32"] = move<uint32_t>, t["mov.64"] = move<uint64_t>;
  t["mov.pred"] = move_predicate;
  t["mov.split"] = split;
  t["mov.gather"] = gather;
  conversions<uint8_t>(t, "u8"), conversions<int8_t>(t, "s8");
  conversions<uint16_t>(t, "u16"), conversions<int16_t>(t, "s16");
  conversions<uint32_t>(t, "u32"), conversions<int32_t>(t, "s32");
  conversions<uint64_t>(t, "u64"), conversions<int64_t>(t, "s64");
  conversions<half>(t, "f16"), conversions<bfloat>(t, "bf16");
  conversions<float>(t, "f32"), conversions<double>(t, "f64");
  t["cvt.f16x2.f32"] = convert_pair<half>;
  t["cvt.bf16x2.f32"] = convert_pair<bfloat>;
  t["cvt.tf32.f32"] = convert_tf32;
  t["cvt.pack"] = pack;
  t["cvta"] = convert_address;
  t["isspacep"] = is_space;
}

}  // namespace ptx
