// Floating-point arithmetic: f16, f16x2, bf16, bf16x2, f32, f64. PTX ISA 9.7.3 to 9.7.5. Approximate instructions (div.full,
// rcp.approx, ex2.approx, ...) give the correctly rounded result, which lies within the error that the ISA allows.

#include <cmath>
#include <type_traits>

#include "lanes.h"

namespace ptx {
namespace {

template <typename T> struct Arithmetic { using type = T; };  // what a type is computed in
template <> struct Arithmetic<half> { using type = float; };
template <> struct Arithmetic<bfloat> { using type = float; };
template <typename T> using arithmetic = typename Arithmetic<T>::type;

template <typename T> arithmetic<T> widen(T x) { return static_cast<arithmetic<T>>(x); }
template <> float widen<bfloat>(bfloat x) { return to_float(x); }
template <typename T> T narrow(arithmetic<T> x) { return static_cast<T>(x); }
template <> bfloat narrow<bfloat>(float x) { return to_bfloat(x); }

// A float sum or product of halves is exact enough that rounding twice never differs (24 >= 2 * 11 + 2 bits).
template <typename C> C add(C a, C b) { return a + b; }
template <typename C> C sub(C a, C b) { return a - b; }
template <typename C> C mul(C a, C b) { return a * b; }
template <typename C> C div(C a, C b) { return a / b; }
// A number and a NaN give the number; -0 is less than 0.
template <typename C> C lower(C a, C b) { return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b; }
template <typename C> C upper(C a, C b) { return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b; }
template <typename C> C neg(C a) { return -a; }
template <typename C> C abs_of(C a) { return std::fabs(a); }
template <typename C> C rcp(C a) { return 1 / a; }
template <typename C> C sqrt_of(C a) { return std::sqrt(a); }
template <typename C> C rsqrt(C a) { return static_cast<C>(1 / std::sqrt(static_cast<double>(a))); }
template <typename C> C ex2(C a) { return static_cast<C>(std::exp2(static_cast<double>(a))); }
template <typename C> C lg2(C a) { return static_cast<C>(std::log2(static_cast<double>(a))); }
template <typename C> C sin_of(C a) { return static_cast<C>(std::sin(static_cast<double>(a))); }
template <typename C> C cos_of(C a) { return static_cast<C>(std::cos(static_cast<double>(a))); }
template <typename C> C tanh_of(C a) { return static_cast<C>(std::tanh(static_cast<double>(a))); }

template <typename C>
C finish(C x, int64_t flags) {
  if constexpr (std::is_same_v<C, float>)
    if (flags & kFlush) x = flush(x);
  if (flags & kSaturate) x = x != x ? 0 : x < 0 ? 0 : x > 1 ? 1 : x;
  return x;
}
template <typename C>
C start(C x, int64_t flags) {
  if constexpr (std::is_same_v<C, float>)
    if (flags & kFlush) return flush(x);
  return x;
}

// Registers hold kPack values of T as a word W.
template <typename T, typename W, arithmetic<T> (*f)(arithmetic<T>)>
void unary(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  constexpr int kPack = sizeof(W) / sizeof(T);
  const Source<W> a(w, i.ops[1]);
  Target<W> d(w, i.ops[0], mask);
  const int64_t flags = i.ints[0];
  each(mask, [&](int l) {
    T x[kPack];
    std::memcpy(x, &a.data[l], sizeof(W));
    for (T& v : x) v = narrow<T>(finish(f(start(widen(v), flags)), flags));
    std::memcpy(&d[l], x, sizeof(W));
  });
}
template <typename T, typename W, arithmetic<T> (*f)(arithmetic<T>, arithmetic<T>)>
void binary(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  constexpr int kPack = sizeof(W) / sizeof(T);
  const Source<W> a(w, i.ops[1]), b(w, i.ops[2]);
  Target<W> d(w, i.ops[0], mask);
  const int64_t flags = i.ints[0];
  each(mask, [&](int l) {
    T x[kPack], y[kPack];
    std::memcpy(x, &a.data[l], sizeof(W));
    std::memcpy(y, &b.data[l], sizeof(W));
    for (int k = 0; k < kPack; ++k) {
      const arithmetic<T> p = start(widen(x[k]), flags), q = start(widen(y[k]), flags);
      const bool poison = flags & kNanFlag && (p != p || q != q);
      x[k] = narrow<T>(poison ? static_cast<arithmetic<T>>(NAN) : finish(f(p, q), flags));
    }
    std::memcpy(&d[l], x, sizeof(W));
  });
}

// One rounding. Half and bfloat products are exact in double; with the sum in double the result is rounded to odd first, so that
// the second rounding cannot be a tie that was none.
inline double sum_to_odd(double a, double b) {
  const double s = a + b;
  if (!std::isfinite(s)) return s;
  const double t = s - a, error = (a - (s - t)) + (b - t);
  if (error == 0 || (bits_of<uint64_t>(s) & 1)) return s;
  const bool up = (error > 0) == (s > 0);
  return bits_of<double>(bits_of<uint64_t>(s) + (up ? 1 : -1));
}
template <typename T>
T fused(T a, T b, T c, int64_t flags) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    return finish(std::fma(start(a, flags), start(b, flags), start(c, flags)), flags);
  } else {
    double r = sum_to_odd(static_cast<double>(widen(a)) * widen(b), widen(c));
    if (flags & kSaturate) r = r != r ? 0 : r < 0 ? 0 : r > 1 ? 1 : r;
    if constexpr (std::is_same_v<T, half>) return static_cast<half>(r);
    const float f = static_cast<float>(r);  // towards odd again
    if (std::isfinite(f) && static_cast<double>(f) != r && !(bits_of<uint32_t>(f) & 1)) {
      const bool up = (static_cast<double>(f) < r) == (f > 0);
      return narrow<T>(bits_of<float>(bits_of<uint32_t>(f) + (up ? 1 : -1)));
    }
    return narrow<T>(f);
  }
}
template <typename T, typename W>
void fma(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  constexpr int kPack = sizeof(W) / sizeof(T);
  const Source<W> a(w, i.ops[1]), b(w, i.ops[2]), c(w, i.ops[3]);
  Target<W> d(w, i.ops[0], mask);
  const int64_t flags = i.ints[0];
  each(mask, [&](int l) {
    T x[kPack], y[kPack], z[kPack];
    std::memcpy(x, &a.data[l], sizeof(W));
    std::memcpy(y, &b.data[l], sizeof(W));
    std::memcpy(z, &c.data[l], sizeof(W));
    for (int k = 0; k < kPack; ++k) {
      x[k] = fused<T>(x[k], y[k], z[k], flags);
      if (flags & kNanFlag && !(widen(x[k]) > 0)) x[k] = narrow<T>(widen(x[k]) != widen(x[k]) ? widen(x[k]) : 0);  // .relu
    }
    std::memcpy(&d[l], x, sizeof(W));
  });
}
template <typename T>
void copysign_of(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]), b(w, i.ops[2]);
  Target<T> d(w, i.ops[0], mask);
  each(mask, [&](int l) { d[l] = std::copysign(b[l], a[l]); });
}
// Kinds: 0 finite, 1 infinite, 2 number, 3 notanumber, 4 normal, 5 subnormal.
template <typename T>
void test(Machine&, Warp& w, const Inst& i, uint32_t mask) {
  const Source<T> a(w, i.ops[1]);
  uint32_t r = 0;
  for (int l = 0; l < kLanes; ++l) {
    const int kind = std::fpclassify(a[l]);
    const bool yes[] = {kind != FP_INFINITE && kind != FP_NAN, kind == FP_INFINITE, kind != FP_NAN,
                        kind == FP_NAN, kind == FP_NORMAL, kind == FP_SUBNORMAL};
    r |= static_cast<uint32_t>(yes[i.ints[0]]) << l;
  }
  write_predicate(w, i.ops[0], r, mask);
}

using Table = std::unordered_map<std::string, Handler>;

template <typename T, typename W>
void floats(Table& t, const std::string& s) {
  using C = arithmetic<T>;
  t["add." + s] = binary<T, W, add<C>>;
  t["sub." + s] = binary<T, W, sub<C>>;
  t["mul." + s] = binary<T, W, mul<C>>;
  t["div." + s] = binary<T, W, div<C>>;
  t["min." + s] = binary<T, W, lower<C>>;
  t["max." + s] = binary<T, W, upper<C>>;
  t["neg." + s] = unary<T, W, neg<C>>;
  t["abs." + s] = unary<T, W, abs_of<C>>;
  t["fma." + s] = fma<T, W>;
  t["ex2." + s] = unary<T, W, ex2<C>>;
  t["tanh." + s] = unary<T, W, tanh_of<C>>;
}
template <typename T>
void functions(Table& t, const std::string& s) {
  t["rcp." + s] = unary<T, T, rcp<T>>;
  t["sqrt." + s] = unary<T, T, sqrt_of<T>>;
  t["rsqrt." + s] = unary<T, T, rsqrt<T>>;
  t["lg2." + s] = unary<T, T, lg2<T>>;
  t["sin." + s] = unary<T, T, sin_of<T>>;
  t["cos." + s] = unary<T, T, cos_of<T>>;
  t["copysign." + s] = copysign_of<T>;
  t["testp." + s] = test<T>;
}

}  // namespace

void register_float(Table& t) {
  floats<float, float>(t, "f32"), floats<double, double>(t, "f64");
  floats<half, uint16_t>(t, "f16"), floats<half, uint32_t>(t, "f16x2");
  floats<bfloat, uint16_t>(t, "bf16"), floats<bfloat, uint32_t>(t, "bf16x2");
  floats<float, uint64_t>(t, "f32x2");
  functions<float>(t, "f32"), functions<double>(t, "f64");
}

}  // namespace ptx
