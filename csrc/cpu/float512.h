// AVX-512: 16 floats to a vector. What the members do: see float128.h.
#pragma once

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 finds its own intrinsics' undefined vectors
#include <immintrin.h>

namespace cnncomp {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kChains = 4;  // multiply-adds in flight
  static constexpr int kRegisters = 32;
  static constexpr bool kShifts = true;  // has odd() and from()

  static Vec broadcast(float v) { return _mm512_set1_ps(v); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  using Mask = __mmask16;
  static Mask between(int first, int last) { return static_cast<Mask>(mask(last) & ~mask(first)); }
  static Vec load_masked(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
  static Vec load_between(const float* p, int first, int last) { return load_masked(p, between(first, last)); }
  static void store_first(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, mask(n), v); }
  static __m256 low(Vec v) { return _mm512_castps512_ps256(v); }  // as a vector of HalfAvx512
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) {  // the instruction gives b if either is NaN
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  // The operand that may be NaN comes second.
  static Vec at_least(Vec v, Vec lo) { return _mm512_max_ps(lo, v); }
  static Vec at_most(Vec v, Vec hi) { return _mm512_min_ps(hi, v); }
  static Vec clamp(Vec v, Vec lo, Vec hi) { return _mm512_min_ps(hi, _mm512_max_ps(lo, v)); }
  static Vec times_pow2(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }
  static Vec even(Vec a, Vec b) {
    const __m512i i = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(a, i, b);
  }
  static Vec odd(Vec a, Vec b) {
    const __m512i i = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_ps(a, i, b);
  }
  // Lanes from the n-th of `low` on, then those of `high`.
  template <int n>
  static Vec from(Vec low, Vec high) {
    return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(high), _mm512_castps_si512(low), n));
  }

 private:
  static __mmask16 mask(int n) {  // of the first n lanes
    return static_cast<__mmask16>(n <= 0 ? 0u : n >= kLanes ? 0xffffu : (1u << n) - 1);
  }
};

// Half a vector, with the masks of AVX-512.
struct HalfAvx512 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr bool kShifts = true;

  static Vec broadcast(float v) { return _mm256_set1_ps(v); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  using Mask = __mmask8;
  static Mask between(int first, int last) { return static_cast<Mask>(mask(last) & ~mask(first)); }
  static Vec load_masked(const float* p, Mask m) { return _mm256_maskz_loadu_ps(m, p); }
  static Vec load_between(const float* p, int first, int last) { return load_masked(p, between(first, last)); }
  static void store_first(float* p, Vec v, int n) { _mm256_mask_storeu_ps(p, mask(n), v); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec at_least(Vec v, Vec lo) { return _mm256_max_ps(lo, v); }
  static Vec clamp(Vec v, Vec lo, Vec hi) { return _mm256_min_ps(hi, _mm256_max_ps(lo, v)); }
  static Vec even(Vec a, Vec b) {
    return _mm256_permutex2var_ps(a, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14), b);
  }
  static Vec odd(Vec a, Vec b) {
    return _mm256_permutex2var_ps(a, _mm256_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15), b);
  }
  template <int n>
  static Vec from(Vec low, Vec high) {
    return _mm256_castsi256_ps(_mm256_alignr_epi32(_mm256_castps_si256(high), _mm256_castps_si256(low), n));
  }

 private:
  static __mmask8 mask(int n) { return static_cast<__mmask8>(n <= 0 ? 0u : n >= kLanes ? 0xffu : (1u << n) - 1); }
};

}  // namespace
}  // namespace cnncomp
