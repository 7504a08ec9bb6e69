// Vectors of floats for the fp32 kernels. Plain C++: 4 floats, one SSE2 or NEON register.
//
// Baseline, Avx2 and Avx512 have the same members. load_masked(p, between(first, last)), or in short load_between(p, first,
// last), gives lanes [first, last), zero elsewhere, and reads nothing else; store_first writes the first n lanes; max gives NaN
// where one of the two is, at_least and clamp keep it, as torch does; even(a, b) gives the even elements of the two;
// times_pow2(v, n) takes whole numbers n from -126 to 127. Where
// kShifts is set, odd(a, b) gives the odd ones, and from<n>(low, high) the lanes from the n-th of `low` on, then those of `high`.
#pragma once

namespace cnncomp {
namespace {

struct Baseline {
  static constexpr int kLanes = 4;
  static constexpr int kChains = 8;  // multiply-adds in flight
  static constexpr int kRegisters = 16;
  static constexpr bool kShifts = false;
  typedef float Vec __attribute__((vector_size(16)));
  typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));

  static Vec broadcast(float v) { return Vec{v, v, v, v}; }
  static Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(float* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }
  struct Mask {
    int first, last;
  };
  static Mask between(int first, int last) { return {first, last}; }
  static Vec load_masked(const float* p, Mask m) {
    if (m.first <= 0 && m.last >= kLanes) return load(p);
    Vec v = {};
    for (int i = 0; i < kLanes; i++) {
      if (m.first <= i && i < m.last) v[i] = p[i];
    }
    return v;
  }
  static Vec load_between(const float* p, int first, int last) { return load_masked(p, between(first, last)); }
  static void store_first(float* p, Vec v, int n) {
    for (int i = 0; i < n; i++) p[i] = v[i];
  }
  static Vec add(Vec a, Vec b) { return a + b; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static Vec div(Vec a, Vec b) { return a / b; }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  // Comparisons with NaN are false.
  static Vec max(Vec a, Vec b) { return (a > b) | (a != a) ? a : b; }
  static Vec at_least(Vec v, Vec lo) { return v < lo ? lo : v; }
  static Vec clamp(Vec v, Vec lo, Vec hi) {
    return at_most(at_least(v, lo), hi);
  }
  static Vec at_most(Vec v, Vec hi) { return v > hi ? hi : v; }
  static Vec times_pow2(Vec v, Vec n) {
    typedef int Ints __attribute__((vector_size(16)));
    return v * reinterpret_cast<Vec>((__builtin_convertvector(n, Ints) + 127) << 23);
  }
  static Vec even(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6); }
};

}  // namespace
}  // namespace cnncomp
