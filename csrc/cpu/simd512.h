// 512-bit vectors: AVX-512 F, BW, DQ, VL; VNNI where the translation unit has it. See simd128.h for what is what.
#pragma once

#include "simd256.h"

namespace cnncomp {
namespace {

struct Vec512 {
  using Int = __m512i;
  using Float = __m512;
  static constexpr int kBytes = 64;
  static constexpr int kLanes = 16;

#ifdef __AVX512VNNI__
  static constexpr bool kSplits = false, kSaturates = false;
  using Operand = Int;
  static Operand input(Int x) { return x; }
  static Operand weight(Int w) { return w; }
  static Int dot(Int acc, Operand x, Operand w) { return _mm512_dpbusd_epi32(acc, x, w); }
#else
  static constexpr bool kSplits = true, kSaturates = true;
  struct Operand {
    Int even, odd;
  };
  static Operand input(Int x) { return {_mm512_and_si512(x, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(x, 8)}; }
  static Operand weight(Int w) { return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)}; }
  static Int dot(Int acc, Operand x, Operand w) {
    const Int sum = _mm512_add_epi32(_mm512_madd_epi16(x.even, w.even), _mm512_madd_epi16(x.odd, w.odd));
    return _mm512_add_epi32(acc, sum);
  }
  static Int dot_bytes(Int acc, Int x, Int w) {
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(x, w), _mm512_set1_epi16(1)));
  }
  static Int dot_two(Int acc, Int x0, Int w0, Int x1, Int w1) {
    const Int sum = _mm512_add_epi16(_mm512_maddubs_epi16(x0, w0), _mm512_maddubs_epi16(x1, w1));
    return _mm512_add_epi32(acc, _mm512_madd_epi16(sum, _mm512_set1_epi16(1)));
  }
  static Int highest(Int most, Int w) { return _mm512_maddubs_epi16(most, _mm512_max_epi8(w, set(0))); }
  static Int lowest(Int most, Int w) { return _mm512_maddubs_epi16(most, _mm512_min_epi8(w, set(0))); }
  static Int saturated(Int highest, Int lowest) {
    return _mm512_movm_epi16(_mm512_cmpeq_epi16_mask(highest, _mm512_set1_epi16(INT16_MAX)) |
                             _mm512_cmpeq_epi16_mask(lowest, _mm512_set1_epi16(INT16_MIN)));
  }
  static Int pairs_beyond(Int most, Int w) { return saturated(highest(most, w), lowest(most, w)); }
  static Int two_beyond(Int most0, Int w0, Int most1, Int w1) {
    return saturated(_mm512_adds_epi16(highest(most0, w0), highest(most1, w1)),
                     _mm512_adds_epi16(lowest(most0, w0), lowest(most1, w1)));
  }
  static bool none(Int v) { return _mm512_test_epi32_mask(v, v) == 0; }
  static Int halve_bytes(Int v) {
    const Int even = bit_and(_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 9), _mm512_set1_epi16(0xff));
    return bit_or(even, _mm512_slli_epi16(_mm512_srai_epi16(v, 9), 8));
  }
  static Int sub_bytes(Int a, Int b) { return _mm512_sub_epi8(a, b); }
#endif

  static Int broadcast(const uint8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return _mm512_set1_epi32(quad);
  }
  static Int set(int32_t v) { return _mm512_set1_epi32(v); }
  static Int load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Int v) { _mm512_storeu_si512(p, v); }
  static Int bit_xor(Int a, Int b) { return _mm512_xor_si512(a, b); }
  static Int bit_or(Int a, Int b) { return _mm512_or_si512(a, b); }
  static Int bit_and(Int a, Int b) { return _mm512_and_si512(a, b); }
  static Int add_int(Int a, Int b) { return _mm512_add_epi32(a, b); }
  template <int N>
  static Int shift_left(Int a) { return _mm512_slli_epi32(a, N); }
  template <int N>
  static Int shift_right(Int a) { return _mm512_srai_epi32(a, N); }

  static Int zip8_lo(Int a, Int b) { return _mm512_unpacklo_epi8(a, b); }
  static Int zip8_hi(Int a, Int b) { return _mm512_unpackhi_epi8(a, b); }
  static Int zip16_lo(Int a, Int b) { return _mm512_unpacklo_epi16(a, b); }
  static Int zip16_hi(Int a, Int b) { return _mm512_unpackhi_epi16(a, b); }
  static Int zip32_lo(Int a, Int b) { return _mm512_unpacklo_epi32(a, b); }
  static Int zip32_hi(Int a, Int b) { return _mm512_unpackhi_epi32(a, b); }
  static Int zip64_lo(Int a, Int b) { return _mm512_unpacklo_epi64(a, b); }
  static Int zip64_hi(Int a, Int b) { return _mm512_unpackhi_epi64(a, b); }
  static Int load_rows(const uint8_t* const* rows, int64_t at) {
    Int v = _mm512_castsi128_si512(Vec128::load(rows[0] + at));
    v = _mm512_inserti32x4(v, Vec128::load(rows[4] + at), 1);
    v = _mm512_inserti32x4(v, Vec128::load(rows[8] + at), 2);
    return _mm512_inserti32x4(v, Vec128::load(rows[12] + at), 3);
  }
  static Int load_lanes(const uint8_t* p, int64_t step) {
    Int v = _mm512_castsi128_si512(Vec128::load(p));
    v = _mm512_inserti32x4(v, Vec128::load(p + step), 1);
    v = _mm512_inserti32x4(v, Vec128::load(p + 2 * step), 2);
    return _mm512_inserti32x4(v, Vec128::load(p + 3 * step), 3);
  }
  static void store_lanes(uint8_t* p, int64_t step, Int v) {
    Vec128::store(p, _mm512_castsi512_si128(v));
    Vec128::store(p + step, _mm512_extracti32x4_epi32(v, 1));
    Vec128::store(p + 2 * step, _mm512_extracti32x4_epi32(v, 2));
    Vec128::store(p + 3 * step, _mm512_extracti32x4_epi32(v, 3));
  }
  template <bool SIGNED>
  static Int pack(Int a, Int b, Int c, Int d) {
    const Int ab = _mm512_packs_epi32(a, b), cd = _mm512_packs_epi32(c, d);
    return SIGNED ? _mm512_packs_epi16(ab, cd) : _mm512_packus_epi16(ab, cd);
  }
  template <int I, int COUNT>
  static void store_part(void* p, Int v) {
    if constexpr (COUNT == 4) {
      store(p, v);
    } else if constexpr (COUNT == 2) {
      Vec256::store(p, _mm512_extracti64x4_epi64(v, I / 2));
    } else {
      Vec128::store(p, _mm512_extracti32x4_epi32(v, I));
    }
  }

  static void store_triples(uint8_t* p, Int v) {
    const __m128i order = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    v = _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(order));
    store_part<0, 1>(p, v);
    store_part<1, 1>(p + 12, v);
    store_part<2, 1>(p + 24, v);
    store_part<3, 1>(p + 36, v);
  }

  static Int in_order(Int v) {
    const Int order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, v);
  }
  template <bool SIGNED>
  static Int clamp_bytes(Int v, Int lo, Int hi) {
    if constexpr (SIGNED) return _mm512_min_epi8(_mm512_max_epi8(v, lo), hi);
    return _mm512_min_epu8(_mm512_max_epu8(v, lo), hi);
  }

  static Int load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Int load_s8(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  template <bool SIGNED, int V>
  static void store_bytes(uint8_t* p, const Int (&v)[V]) {
    if constexpr (V == 4) {
      store(p, in_order(pack<SIGNED>(v[0], v[1], v[2], v[3])));
    } else {
      for (int i = 0; i < V; i++) _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16 * i), _mm512_cvtepi32_epi8(v[i]));
    }
  }

  static Int as_int(Float v) { return _mm512_castps_si512(v); }
  static Float as_float(Int v) { return _mm512_castsi512_ps(v); }
  static Float set_float(float v) { return _mm512_set1_ps(v); }
  static Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  static void store_float(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
  static Int round(Float v) { return _mm512_cvtps_epi32(v); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
};

}  // namespace
}  // namespace cnncomp
