// Integer arithmetic, logic, comparison and selection. PTX ISA 9.7.1 (integer), 9.7.6 (comparison), 9.7.8 (logic and shift).

#include <algorithm>
#include <type_traits>

#include "lanes.h"

namespace ptx {
namespace {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
__extension__ using u128 = unsigned __int128;
__extension__ using s128 = __int128;

template <typename T> struct Wider;
template <> struct Wider<u16> { using type = u32; };
template <> struct Wider<s16> { using type = s32; };
template <> struct Wider<u32> { using type = u64; };
template <> struct Wider<s32> { using type = s64; };
template <> struct Wider<u64> { using type = u128; };
template <> struct Wider<s64> { using type = s128; };
template <typename T> using wider = typename Wider<T>::type;
template <typename T> using unsigned_of = std::make_unsigned_t<T>;
template <typename T> constexpr int kBits = 8 * sizeof(T);

template <typename T, T (*f)(T)>
void unary(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]);
  Target<T> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = f(a[l]); });
}
template <typename T, T (*f)(T, T)>
void binary(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]), b(w, i.ops[2]);
  Target<T> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = f(a[l], b[l]); });
}
template <typename T, T (*f)(T, T, T)>
void ternary(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]), b(w, i.ops[2]), c(w, i.ops[3]);
  Target<T> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = f(a[l], b[l], c[l]); });
}

template <typename T> T add(T a, T b) { return static_cast<T>(static_cast<unsigned_of<T>>(a) + static_cast<unsigned_of<T>>(b)); }
template <typename T> T sub(T a, T b) { return static_cast<T>(static_cast<unsigned_of<T>>(a) - static_cast<unsigned_of<T>>(b)); }
template <typename T> T mul_lo(T a, T b) { return static_cast<T>(static_cast<u64>(a) * static_cast<u64>(b)); }
template <typename T> T mul_hi(T a, T b) { return static_cast<T>(static_cast<wider<T>>(a) * static_cast<wider<T>>(b) >> kBits<T>); }
template <typename T> T mad_lo(T a, T b, T c) { return add<T>(mul_lo<T>(a, b), c); }
template <typename T> T mad_hi(T a, T b, T c) { return add<T>(mul_hi<T>(a, b), c); }
template <typename T> T min_of(T a, T b) { return std::min(a, b); }
template <typename T> T max_of(T a, T b) { return std::max(a, b); }
template <typename T> T negate(T a) { return sub<T>(0, a); }
template <typename T> T absolute(T a) { return a < 0 ? negate<T>(a) : a; }
template <typename T> T and_of(T a, T b) { return a & b; }
template <typename T> T or_of(T a, T b) { return a | b; }
template <typename T> T xor_of(T a, T b) { return a ^ b; }
template <typename T> T not_of(T a) { return static_cast<T>(~a); }
template <typename T> T cnot(T a) { return a == 0; }
template <typename T> T sad(T a, T b, T c) { return add<T>(c, static_cast<T>(a < b ? sub<T>(b, a) : sub<T>(a, b))); }
u32 reverse_bits(u32 x) {
  u32 r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
u64 reverse_bits64(u64 x) { return static_cast<u64>(reverse_bits(static_cast<u32>(x))) << 32 | reverse_bits(static_cast<u32>(x >> 32)); }

template <typename T>
void mul_wide(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  using W = wider<T>;
  const Source<T> a(w, i.ops[1]), b(w, i.ops[2]);
  Target<W> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = static_cast<W>(a[l]) * static_cast<W>(b[l]); });
}
template <typename T>
void mad_wide(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  using W = wider<T>;
  const Source<T> a(w, i.ops[1]), b(w, i.ops[2]);
  const Source<W> c(w, i.ops[3]);
  Target<W> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = add<W>(static_cast<W>(a[l]) * static_cast<W>(b[l]), c[l]); });
}

template <typename T, bool kRemainder>
void divide(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]), b(w, i.ops[2]);
  Target<T> d(w, i.ops[0], mask);
  for (uint32_t m = mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    if (b[l] == 0) fail(kUnsupported, "division by zero, whose result is unspecified", l);
    if (std::is_signed_v<T> && b[l] == static_cast<T>(-1)) d[l] = kRemainder ? 0 : negate<T>(a[l]);
    else d[l] = static_cast<T>(kRemainder ? a[l] % b[l] : a[l] / b[l]);
  }
}

// add.cc, addc, sub.cc, subc, mad.cc, madc: the carry of each lane is a bit of w.carry.
template <typename T, bool kSubtract>
void carry_binary(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]), b(w, i.ops[2]);
  Target<T> d(w, i.ops[0], mask);
  const int64_t flags = i.ints[0];
  for (uint32_t m = mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const u128 in = flags & kCarryIn ? w.carry >> l & 1 : 0;
    const u128 r = kSubtract ? static_cast<u128>(a[l]) - b[l] - in : static_cast<u128>(a[l]) + b[l] + in;
    d[l] = static_cast<T>(r);
    if (flags & kCarryOut) w.carry = (w.carry & ~(1u << l)) | static_cast<u32>(r >> kBits<T> & 1) << l;
  }
}
template <typename T, bool kHigh>
void carry_mad(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]), b(w, i.ops[2]), c(w, i.ops[3]);
  Target<T> d(w, i.ops[0], mask);
  const int64_t flags = i.ints[0];
  for (uint32_t m = mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const T product = kHigh ? mul_hi<T>(a[l], b[l]) : mul_lo<T>(a[l], b[l]);
    const u128 r = static_cast<u128>(static_cast<unsigned_of<T>>(product)) + static_cast<unsigned_of<T>>(c[l]) + (flags & kCarryIn ? w.carry >> l & 1 : 0);
    d[l] = static_cast<T>(r);
    if (flags & kCarryOut) w.carry = (w.carry & ~(1u << l)) | static_cast<u32>(r >> kBits<T> & 1) << l;
  }
}

template <typename T, bool kSubtract>
void saturating(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]), b(w, i.ops[2]);
  Target<T> d(w, i.ops[0], mask);
  each(mask, [&](int l) {
    const s64 r = kSubtract ? static_cast<s64>(a[l]) - b[l] : static_cast<s64>(a[l]) + b[l];
    d[l] = static_cast<T>(std::clamp<s64>(r, INT32_MIN, INT32_MAX));
  });
}

// Counts of the width and more shift everything out; a signed shr then leaves the sign.
template <typename T, bool kLeft>
void shift(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]);
  const Source<u32> b(w, i.ops[2]);
  Target<T> d(w, i.ops[0], mask);
  each(mask, [&](int l) {
    const u32 n = std::min<u32>(b[l], kBits<T>);
    const u32 half1 = n / 2, half2 = n - half1;  // in two steps, as C++ has no shift by the width
    if constexpr (kLeft) d[l] = static_cast<T>(static_cast<T>(static_cast<unsigned_of<T>>(a[l]) << half1) << half2);
    else d[l] = static_cast<T>(static_cast<T>(a[l] >> half1) >> half2);
  });
}
template <bool kLeft>
void funnel(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<u32> a(w, i.ops[1]), b(w, i.ops[2]), c(w, i.ops[3]);
  Target<u32> d(w, i.ops[0], mask);
  const bool clamp = i.ints[0];
  each(mask, [&](int l) {
    const u32 n = clamp ? std::min<u32>(c[l], 32) : c[l] & 31;
    const u64 both = static_cast<u64>(b[l]) << 32 | a[l];
    d[l] = static_cast<u32>(kLeft ? both << n >> 32 : both >> n);
  });
}

template <typename T>
void extract(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]);
  const Source<u32> pos(w, i.ops[2]), len(w, i.ops[3]);
  Target<T> d(w, i.ops[0], mask);
  using U = unsigned_of<T>;
  each(mask, [&](int l) {
    const int p = pos[l] & 255, n = len[l] & 255;
    const int top = std::min(p + n - 1, kBits<T> - 1);
    const bool sign = std::is_signed_v<T> && n > 0 && (static_cast<U>(a[l]) >> top & 1);
    U r = 0;
    for (int k = 0; k < kBits<T>; ++k) {
      const bool bit = k < n && p + k < kBits<T> ? static_cast<U>(a[l]) >> (p + k) & 1 : sign;
      r |= static_cast<U>(bit) << k;
    }
    d[l] = static_cast<T>(r);
  });
}
template <typename T>
void insert(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]), b(w, i.ops[2]);
  const Source<u32> pos(w, i.ops[3]), len(w, i.ops[4]);
  Target<T> d(w, i.ops[0], mask);
  each(mask, [&](int l) {
    T r = b[l];
    const int p = pos[l] & 255, n = len[l] & 255;
    for (int k = 0; k < n && p + k < kBits<T>; ++k) r = (r & ~(T{1} << (p + k))) | (a[l] >> k & T{1}) << (p + k);
    d[l] = r;
  });
}
template <typename T>
void find_leading(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]);
  Target<u32> d(w, i.ops[0], mask);
  each(mask, [&](int l) {
    const u64 x = static_cast<unsigned_of<T>>(std::is_signed_v<T> && a[l] < 0 ? ~a[l] : a[l]);
    const u32 at = x ? 63 - __builtin_clzll(x) : kFull;
    d[l] = i.ints[0] && x ? kBits<T> - 1 - at : at;  // .shiftamt
  });
}
template <typename T, bool kCount>
void count_bits(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]);
  Target<u32> d(w, i.ops[0], mask);
  each(mask, [&](int l) {
    const u64 x = a[l];
    d[l] = kCount ? __builtin_popcountll(x) : x ? __builtin_clzll(x) - (64 - kBits<T>) : kBits<T>;
  });
}

void logic3(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<u32> a(w, i.ops[1]), b(w, i.ops[2]), c(w, i.ops[3]);
  Target<u32> d(w, i.ops[0], mask);
  const int64_t table = i.ints[0];
  each(mask, [&](int l) {
    u32 r = 0;
    for (int k = 0; k < 8; ++k)
      if (table >> k & 1) r |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
    d[l] = r;
  });
}

// Modes: 0 the selector of each byte, 1 f4e, 2 b4e, 3 rc8, 4 ecl, 5 ecr, 6 rc16.
void permute(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<u32> a(w, i.ops[1]), b(w, i.ops[2]), c(w, i.ops[3]);
  Target<u32> d(w, i.ops[0], mask);
  const int64_t mode = i.ints[0];
  each(mask, [&](int l) {
    const u64 both = static_cast<u64>(b[l]) << 32 | a[l];
    const u32 s = c[l];
    u32 r = 0;
    for (u32 k = 0; k < 4; ++k) {
      u32 select = s >> (4 * k) & 15;
      const u32 t = s & 3;
      if (mode == 1) select = (t + k) & 7;
      if (mode == 2) select = (t + 8 - k) & 7;
      if (mode == 3) select = t;
      if (mode == 4) select = std::max(k, t);
      if (mode == 5) select = std::min(k, t);
      if (mode == 6) select = (s & 1) * 2 + (k & 1);
      u32 byte = both >> (8 * (select & 7)) & 255;
      if (select & 8) byte = byte & 128 ? 255 : 0;
      r |= byte << (8 * k);
    }
    d[l] = r;
  });
}

template <bool kSignedA, bool kSignedB>
void dot4(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<u32> a(w, i.ops[1]), b(w, i.ops[2]), c(w, i.ops[3]);
  Target<u32> d(w, i.ops[0], mask);
  each(mask, [&](int l) {
    u32 r = c[l];
    for (int k = 0; k < 4; ++k) {
      const int x = a[l] >> (8 * k) & 255, y = b[l] >> (8 * k) & 255;
      r += static_cast<u32>((kSignedA ? static_cast<int8_t>(x) : x) * (kSignedB ? static_cast<int8_t>(y) : y));
    }
    d[l] = r;
  });
}
template <bool kSignedA, bool kSignedB>
void dot2(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<u32> a(w, i.ops[1]), b(w, i.ops[2]), c(w, i.ops[3]);
  Target<u32> d(w, i.ops[0], mask);
  const bool high = i.ints[0];
  each(mask, [&](int l) {
    u32 r = c[l];
    for (int k = 0; k < 2; ++k) {
      const int x = a[l] >> (16 * k) & 0xffff, y = b[l] >> (8 * (k + (high ? 2 : 0))) & 255;
      r += static_cast<u32>((kSignedA ? static_cast<int16_t>(x) : x) * (kSignedB ? static_cast<int8_t>(y) : y));
    }
    d[l] = r;
  });
}

// setp: ints are the boolean operation with a third source (0 none, 1 and, 2 or, 3 xor) and whether that is negated.
void set_predicates(Warp& w, const Inst& i, uint32_t mask, uint32_t r) {
  auto combine = [&](uint32_t x) {
    if (!i.ints[0]) return x;
    const uint32_t c = w.predicate(i.ops[4].slot) ^ (i.ints[1] ? kFull : 0);
    return i.ints[0] == 1 ? x & c : i.ints[0] == 2 ? x | c : x ^ c;
  };
  const uint32_t p = combine(r), q = combine(~r);
  write_predicate(w, i.ops[0], p, mask);
  write_predicate(w, i.ops[1], q, mask);
}
template <typename T, bool (*f)(T, T)>
void compare(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[2]), b(w, i.ops[3]);
  uint32_t r = 0;
  for (int l = 0; l < kLanes; ++l) r |= static_cast<uint32_t>(f(a[l], b[l])) << l;
  set_predicates(w, i, mask, r);
}
template <typename T> bool eq(T a, T b) { return a == b; }
template <typename T> bool lt(T a, T b) { return a < b; }
template <typename T> bool le(T a, T b) { return a <= b; }
template <typename T> bool gt(T a, T b) { return a > b; }
template <typename T> bool ge(T a, T b) { return a >= b; }
template <typename T> bool is_nan(T a) { return a != a; }
// The unordered forms are true where an operand is NaN, the plain ones then false, ne too.
template <typename T> bool ne(T a, T b) { return a != b && !is_nan(a) && !is_nan(b); }
template <typename T> bool equ(T a, T b) { return a == b || is_nan(a) || is_nan(b); }
template <typename T> bool neu(T a, T b) { return a != b; }
template <typename T> bool ltu(T a, T b) { return !(a >= b); }
template <typename T> bool leu(T a, T b) { return !(a > b); }
template <typename T> bool gtu(T a, T b) { return !(a <= b); }
template <typename T> bool geu(T a, T b) { return !(a < b); }
template <typename T> bool num(T a, T b) { return !is_nan(a) && !is_nan(b); }
template <typename T> bool nan(T a, T b) { return is_nan(a) || is_nan(b); }

template <typename T>
void select(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]), b(w, i.ops[2]);
  const uint32_t p = w.predicate(i.ops[3].slot);
  Target<T> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
}

enum PredicateOp { kAnd, kOr, kXor, kNot };
template <PredicateOp op>
void predicates(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const uint32_t a = w.predicate(i.ops[1].slot), b = op == kNot ? 0 : w.predicate(i.ops[2].slot);
  write_predicate(w, i.ops[0], op == kAnd ? a & b : op == kOr ? a | b : op == kXor ? a ^ b : ~a, mask);
}

using Table = std::unordered_map<std::string, Handler>;

template <typename T>
void integers(Table& t, const std::string& s) {
  t["add." + s] = binary<T, add<T>>;
  t["sub." + s] = binary<T, sub<T>>;
  t["mul.lo." + s] = binary<T, mul_lo<T>>;
  t["mul.hi." + s] = binary<T, mul_hi<T>>;
  t["mad.lo." + s] = ternary<T, mad_lo<T>>;
  t["mad.hi." + s] = ternary<T, mad_hi<T>>;
  t["min." + s] = binary<T, min_of<T>>;
  t["max." + s] = binary<T, max_of<T>>;
  t["sad." + s] = ternary<T, sad<T>>;
  t["div." + s] = divide<T, false>;
  t["rem." + s] = divide<T, true>;
  t["shr." + s] = shift<T, false>;
  if constexpr (std::is_signed_v<T>) {
    t["neg." + s] = unary<T, negate<T>>;
    t["abs." + s] = unary<T, absolute<T>>;
  }
  if constexpr (sizeof(T) < 8) {
    t["mul.wide." + s] = mul_wide<T>;
    t["mad.wide." + s] = mad_wide<T>;
  }
  if constexpr (sizeof(T) > 2) {
    t["bfe." + s] = extract<T>;
    t["bfind." + s] = find_leading<T>;
    using U = unsigned_of<T>;
    t["add.cc." + s] = carry_binary<U, false>;
    t["sub.cc." + s] = carry_binary<U, true>;
    t["mad.cc.lo." + s] = carry_mad<T, false>;
    t["mad.cc.hi." + s] = carry_mad<T, true>;
  }
}
template <typename T>
void bits(Table& t, const std::string& s) {
  t["and." + s] = binary<T, and_of<T>>;
  t["or." + s] = binary<T, or_of<T>>;
  t["xor." + s] = binary<T, xor_of<T>>;
  t["not." + s] = unary<T, not_of<T>>;
  t["cnot." + s] = unary<T, cnot<T>>;
  t["shl." + s] = shift<T, true>;
  t["shr." + s] = shift<T, false>;
  if constexpr (sizeof(T) > 2) {
    t["bfi." + s] = insert<T>;
    t["popc." + s] = count_bits<T, true>;
    t["clz." + s] = count_bits<T, false>;
  }
}
template <typename T>
void comparisons(Table& t, const std::string& s) {
  t["setp.eq." + s] = compare<T, eq<T>>;
  t["setp.ne." + s] = compare<T, ne<T>>;
  t["setp.lt." + s] = compare<T, lt<T>>;
  t["setp.le." + s] = compare<T, le<T>>;
  t["setp.gt." + s] = compare<T, gt<T>>;
  t["setp.ge." + s] = compare<T, ge<T>>;
  if constexpr (std::is_unsigned_v<T>) {
    t["setp.lo." + s] = compare<T, lt<T>>;
    t["setp.ls." + s] = compare<T, le<T>>;
    t["setp.hi." + s] = compare<T, gt<T>>;
    t["setp.hs." + s] = compare<T, ge<T>>;
  }
}
template <typename T>
void unordered(Table& t, const std::string& s) {
  t["setp.equ." + s] = compare<T, equ<T>>;
  t["setp.neu." + s] = compare<T, neu<T>>;
  t["setp.ltu." + s] = compare<T, ltu<T>>;
  t["setp.leu." + s] = compare<T, leu<T>>;
  t["setp.gtu." + s] = compare<T, gtu<T>>;
  t["setp.geu." + s] = compare<T, geu<T>>;
  t["setp.num." + s] = compare<T, num<T>>;
  t["setp.nan." + s] = compare<T, nan<T>>;
}

}  // namespace

void register_alu(Table& t) {
  integers<u16>(t, "u16"), integers<s16>(t, "s16");
  integers<u32>(t, "u32"), integers<s32>(t, "s32");
  integers<u64>(t, "u64"), integers<s64>(t, "s64");
  bits<u16>(t, "b16"), bits<u32>(t, "b32"), bits<u64>(t, "b64");
  t["add.sat.s32"] = saturating<s32, false>;
  t["sub.sat.s32"] = saturating<s32, true>;
  t["brev.b32"] = unary<u32, reverse_bits>;
  t["brev.b64"] = unary<u64, reverse_bits64>;
  t["lop3.b32"] = logic3;
  t["prmt.b32"] = permute;
  t["shf.l.b32"] = funnel<true>;
  t["shf.r.b32"] = funnel<false>;
  t["dp4a.u32.u32"] = dot4<false, false>, t["dp4a.u32.s32"] = dot4<false, true>;
  t["dp4a.s32.u32"] = dot4<true, false>, t["dp4a.s32.s32"] = dot4<true, true>;
  t["dp2a.u32.u32"] = dot2<false, false>, t["dp2a.u32.s32"] = dot2<false, true>;
  t["dp2a.s32.u32"] = dot2<true, false>, t["dp2a.s32.s32"] = dot2<true, true>;
  t["and.pred"] = predicates<kAnd>, t["or.pred"] = predicates<kOr>;
  t["xor.pred"] = predicates<kXor>, t["not.pred"] = predicates<kNot>;
  comparisons<u16>(t, "u16"), comparisons<s16>(t, "s16"), comparisons<u16>(t, "b16");
  comparisons<u32>(t, "u32"), comparisons<s32>(t, "s32"), comparisons<u32>(t, "b32");
  comparisons<u64>(t, "u64"), comparisons<s64>(t, "s64"), comparisons<u64>(t, "b64");
  comparisons<float>(t, "f32"), comparisons<double>(t, "f64"), comparisons<half>(t, "f16");
  unordered<float>(t, "f32"), unordered<double>(t, "f64"), unordered<half>(t, "f16");
  t["selp.16"] = select<u16>, t["selp.32"] = select<u32>, t["selp.64"] = select<u64>;
}

}  // namespace ptx
