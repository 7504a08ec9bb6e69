// 256-bit vectors: AVX2; VNNI where the translation unit has it. See simd128.h for what is what.
#pragma once

#include "simd128.h"

namespace cnncomp {
namespace {

struct Vec256 {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int kBytes = 32;
  static constexpr int kLanes = 8;

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  static constexpr bool kSplits = false, kSaturates = false;
  using Operand = Int;
  static Operand input(Int x) { return x; }
  static Operand weight(Int w) { return w; }
#ifdef __AVX512VNNI__
  static Int dot(Int acc, Operand x, Operand w) { return _mm256_dpbusd_epi32(acc, x, w); }
#else
  static Int dot(Int acc, Operand x, Operand w) { return _mm256_dpbusd_avx_epi32(acc, x, w); }
#endif
#else
  static constexpr bool kSplits = true, kSaturates = true;
  struct Operand {
    Int even, odd;
  };
  static Operand input(Int x) { return {_mm256_and_si256(x, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(x, 8)}; }
  static Operand weight(Int w) { return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)}; }
  static Int dot(Int acc, Operand x, Operand w) {
    const Int sum = _mm256_add_epi32(_mm256_madd_epi16(x.even, w.even), _mm256_madd_epi16(x.odd, w.odd));
    return _mm256_add_epi32(acc, sum);
  }
  static Int dot_bytes(Int acc, Int x, Int w) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), _mm256_set1_epi16(1)));
  }
  static Int dot_two(Int acc, Int x0, Int w0, Int x1, Int w1) {
    const Int sum = _mm256_add_epi16(_mm256_maddubs_epi16(x0, w0), _mm256_maddubs_epi16(x1, w1));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
  }
  static Int highest(Int most, Int w) { return _mm256_maddubs_epi16(most, _mm256_max_epi8(w, set(0))); }
  static Int lowest(Int most, Int w) { return _mm256_maddubs_epi16(most, _mm256_min_epi8(w, set(0))); }
  static Int saturated(Int highest, Int lowest) {
    return bit_or(_mm256_cmpeq_epi16(highest, _mm256_set1_epi16(INT16_MAX)), _mm256_cmpeq_epi16(lowest, _mm256_set1_epi16(INT16_MIN)));
  }
  static Int pairs_beyond(Int most, Int w) { return saturated(highest(most, w), lowest(most, w)); }
  static Int two_beyond(Int most0, Int w0, Int most1, Int w1) {
    return saturated(_mm256_adds_epi16(highest(most0, w0), highest(most1, w1)),
                     _mm256_adds_epi16(lowest(most0, w0), lowest(most1, w1)));
  }
  static bool none(Int v) { return _mm256_testz_si256(v, v) != 0; }
  static Int halve_bytes(Int v) {
    const Int even = bit_and(_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 9), _mm256_set1_epi16(0xff));
    return bit_or(even, _mm256_slli_epi16(_mm256_srai_epi16(v, 9), 8));
  }
  static Int sub_bytes(Int a, Int b) { return _mm256_sub_epi8(a, b); }
#endif

  static Int broadcast(const uint8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return _mm256_set1_epi32(quad);
  }
  static Int set(int32_t v) { return _mm256_set1_epi32(v); }
  static Int load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Int v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static Int bit_xor(Int a, Int b) { return _mm256_xor_si256(a, b); }
  static Int bit_or(Int a, Int b) { return _mm256_or_si256(a, b); }
  static Int bit_and(Int a, Int b) { return _mm256_and_si256(a, b); }
  static Int add_int(Int a, Int b) { return _mm256_add_epi32(a, b); }
  template <int N>
  static Int shift_left(Int a) { return _mm256_slli_epi32(a, N); }
  template <int N>
  static Int shift_right(Int a) { return _mm256_srai_epi32(a, N); }

  static Int zip8_lo(Int a, Int b) { return _mm256_unpacklo_epi8(a, b); }
  static Int zip8_hi(Int a, Int b) { return _mm256_unpackhi_epi8(a, b); }
  static Int zip16_lo(Int a, Int b) { return _mm256_unpacklo_epi16(a, b); }
  static Int zip16_hi(Int a, Int b) { return _mm256_unpackhi_epi16(a, b); }
  static Int zip32_lo(Int a, Int b) { return _mm256_unpacklo_epi32(a, b); }
  static Int zip32_hi(Int a, Int b) { return _mm256_unpackhi_epi32(a, b); }
  static Int zip64_lo(Int a, Int b) { return _mm256_unpacklo_epi64(a, b); }
  static Int zip64_hi(Int a, Int b) { return _mm256_unpackhi_epi64(a, b); }
  static Int load_rows(const uint8_t* const* rows, int64_t at) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(Vec128::load(rows[0] + at)), Vec128::load(rows[4] + at), 1);
  }
  static Int load_lanes(const uint8_t* p, int64_t step) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(Vec128::load(p)), Vec128::load(p + step), 1);
  }
  static void store_lanes(uint8_t* p, int64_t step, Int v) {
    Vec128::store(p, _mm256_castsi256_si128(v));
    Vec128::store(p + step, _mm256_extracti128_si256(v, 1));
  }
  template <bool SIGNED>
  static Int pack(Int a, Int b, Int c, Int d) {
    const Int ab = _mm256_packs_epi32(a, b), cd = _mm256_packs_epi32(c, d);
    return SIGNED ? _mm256_packs_epi16(ab, cd) : _mm256_packus_epi16(ab, cd);
  }
  template <int I, int COUNT>
  static void store_part(void* p, Int v) {
    if constexpr (COUNT == 2) {
      store(p, v);
    } else {
      Vec128::store(p, _mm256_extracti128_si256(v, I));
    }
  }
  static Int in_order(Int v) { return _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }
  static void store_triples(uint8_t* p, Int v) {
    const __m128i order = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    v = _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(order));
    store_part<0, 1>(p, v);
    store_part<1, 1>(p + 12, v);
  }
  template <bool SIGNED>
  static Int clamp_bytes(Int v, Int lo, Int hi) {
    if constexpr (SIGNED) return _mm256_min_epi8(_mm256_max_epi8(v, lo), hi);
    return _mm256_min_epu8(_mm256_max_epu8(v, lo), hi);
  }

  static Int load_u8(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  static Int load_s8(const uint8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  template <bool SIGNED>
  static void store_bytes(uint8_t* p, const Int (&v)[2]) {
    // Per 128-bit half: channels 0-3, 8-11 | 4-7, 12-15; the permutation puts the words in order.
    const Int words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v[0], v[1]), 0xd8);
    const __m128i lo = _mm256_castsi256_si128(words), hi = _mm256_extracti128_si256(words, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), SIGNED ? _mm_packs_epi16(lo, hi) : _mm_packus_epi16(lo, hi));
  }

  static Int as_int(Float v) { return _mm256_castps_si256(v); }
  static Float as_float(Int v) { return _mm256_castsi256_ps(v); }
  static Float set_float(float v) { return _mm256_set1_ps(v); }
  static Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  static void store_float(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
  static Int round(Float v) { return _mm256_cvtps_epi32(v); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
};

}  // namespace
}  // namespace cnncomp
