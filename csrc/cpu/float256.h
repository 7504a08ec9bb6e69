// AVX2 and FMA: 8 floats to a vector. What the members do: see float128.h.
#pragma once

#include <immintrin.h>

namespace cnncomp {
namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kChains = 8;  // multiply-adds in flight
  static constexpr int kRegisters = 16;
  static constexpr bool kShifts = false;

  static Vec broadcast(float v) { return _mm256_set1_ps(v); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  using Mask = __m256i;
  static Mask between(int first, int last) { return _mm256_andnot_si256(mask(first), mask(last)); }
  static Vec load_masked(const float* p, Mask m) { return _mm256_maskload_ps(p, m); }
  static Vec load_between(const float* p, int first, int last) { return load_masked(p, between(first, last)); }
  static void store_first(float* p, Vec v, int n) { _mm256_maskstore_ps(p, mask(n), v); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) {  // the instruction gives b if either is NaN
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  // The operand that may be NaN comes second.
  static Vec at_least(Vec v, Vec lo) { return _mm256_max_ps(lo, v); }
  static Vec at_most(Vec v, Vec hi) { return _mm256_min_ps(hi, v); }
  static Vec clamp(Vec v, Vec lo, Vec hi) { return _mm256_min_ps(hi, _mm256_max_ps(lo, v)); }
  static Vec times_pow2(Vec v, Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static Vec even(Vec a, Vec b) {
    const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xd8));
  }

 private:
  static __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

}  // namespace
}  // namespace cnncomp
