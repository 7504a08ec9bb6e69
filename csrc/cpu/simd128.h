// 128-bit vectors: SSE2, NEON, or plain C++ (GCC's and Clang's vector types) where there is neither.
//
// Vec128, Vec256 and Vec512 have the same members, but for those of kSaturates. Int and Float have kLanes 32-bit lanes.
// dot(acc, input(x), weight(w)) adds to each lane of acc the four products of the lane's bytes, u8 in x and s8 in w: exact, no
// saturation. Without a VNNI instruction the bytes are widened to even and odd 16-bit halves, whose products and pair sums fit 32 bits. kSplits: an
// Operand is these two vectors, in this order; what was split before can be loaded as such. kSaturates: there is a product of
// bytes whose sums of two saturate at 16 bits. dot_bytes(acc, x, w) is dot by it, exact unless pairs_beyond(x, w), all ones in
// each pair of bytes whose sum could be beyond 16 bits for some inputs up to x, is not `none`; halve_bytes: rounded down.
// dot_two and two_beyond are the same of two x and w, whose products are added in 16 bits.
// zip*: interleave within each 128 bits; pack<SIGNED>(a, b, c, d): the lanes, saturated to 8 bit, the order of zip undone.
// in_order: of what pack gives, the lanes of a, then those of b, c and d. store_part<I, COUNT>: COUNT (1, 2, 4) times 16 bytes,
// from the I-th on. store_triples, where there is a shuffle of bytes: three bytes of each lane, and four more beyond the last.
// load_rows: 16 bytes from each of rows[0], rows[4], ..., one to each 128 bits; store_rows: the reverse.
// load_lanes: the same as load_rows, `step` bytes apart from p on; store_lanes: the reverse. clamp_bytes: each byte to at least
// lo, then at most hi.
// as_int, as_float: the same bits. store_bytes: the lanes' 8-bit values in order. shift_right keeps the sign. max(a, b) and
// min(a, b) give b where either is NaN.
#pragma once

#include <cstdint>

#if defined(__SSE2__) && !defined(CNNCOMP_PORTABLE)
// GCC 12 finds its own intrinsics' undefined vectors.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace cnncomp {
namespace {

struct Vec128 {
  using Int = __m128i;
  using Float = __m128;
  static constexpr int kBytes = 16;
  static constexpr int kLanes = 4;

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  static constexpr bool kSplits = false, kSaturates = false;
  using Operand = Int;
  static Operand input(Int x) { return x; }
  static Operand weight(Int w) { return w; }
#ifdef __AVX512VNNI__
  static Int dot(Int acc, Operand x, Operand w) { return _mm_dpbusd_epi32(acc, x, w); }
#else
  static Int dot(Int acc, Operand x, Operand w) { return _mm_dpbusd_avx_epi32(acc, x, w); }
#endif
#else
  static constexpr bool kSplits = true, kSaturates = false;
  struct Operand {
    Int even, odd;
  };
  static Operand input(Int x) { return {_mm_and_si128(x, _mm_set1_epi16(0xff)), _mm_srli_epi16(x, 8)}; }
  static Operand weight(Int w) { return {_mm_srai_epi16(_mm_slli_epi16(w, 8), 8), _mm_srai_epi16(w, 8)}; }
  static Int dot(Int acc, Operand x, Operand w) {
    const Int sum = _mm_add_epi32(_mm_madd_epi16(x.even, w.even), _mm_madd_epi16(x.odd, w.odd));
    return _mm_add_epi32(acc, sum);
  }
#endif

  static Int broadcast(const uint8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return _mm_set1_epi32(quad);
  }
  static Int set(int32_t v) { return _mm_set1_epi32(v); }
  static Int load(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static void store(void* p, Int v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
  static Int bit_xor(Int a, Int b) { return _mm_xor_si128(a, b); }
  static Int bit_or(Int a, Int b) { return _mm_or_si128(a, b); }
  static Int bit_and(Int a, Int b) { return _mm_and_si128(a, b); }
  static Int add_int(Int a, Int b) { return _mm_add_epi32(a, b); }
  template <int N>
  static Int shift_left(Int a) { return _mm_slli_epi32(a, N); }
  template <int N>
  static Int shift_right(Int a) { return _mm_srai_epi32(a, N); }

  static Int zip8_lo(Int a, Int b) { return _mm_unpacklo_epi8(a, b); }
  static Int zip8_hi(Int a, Int b) { return _mm_unpackhi_epi8(a, b); }
  static Int zip16_lo(Int a, Int b) { return _mm_unpacklo_epi16(a, b); }
  static Int zip16_hi(Int a, Int b) { return _mm_unpackhi_epi16(a, b); }
  static Int zip32_lo(Int a, Int b) { return _mm_unpacklo_epi32(a, b); }
  static Int zip32_hi(Int a, Int b) { return _mm_unpackhi_epi32(a, b); }
  static Int zip64_lo(Int a, Int b) { return _mm_unpacklo_epi64(a, b); }
  static Int zip64_hi(Int a, Int b) { return _mm_unpackhi_epi64(a, b); }
  static Int load_rows(const uint8_t* const* rows, int64_t at) { return load(rows[0] + at); }
  static Int load_lanes(const uint8_t* p, int64_t step) { return load(p); }
  static void store_lanes(uint8_t* p, int64_t step, Int v) { store(p, v); }
  template <bool SIGNED>
  static Int pack(Int a, Int b, Int c, Int d) {
    const Int ab = _mm_packs_epi32(a, b), cd = _mm_packs_epi32(c, d);
    return SIGNED ? _mm_packs_epi16(ab, cd) : _mm_packus_epi16(ab, cd);
  }
  template <int I, int COUNT>
  static void store_part(void* p, Int v) { store(p, v); }

  static Int in_order(Int v) { return v; }
  template <bool SIGNED>
  static Int clamp_bytes(Int v, Int lo, Int hi) {
    const Int flip = set(SIGNED ? static_cast<int32_t>(0x80808080u) : 0);  // SSE2 compares unsigned bytes only
    v = _mm_min_epu8(_mm_max_epu8(bit_xor(v, flip), bit_xor(lo, flip)), bit_xor(hi, flip));
    return bit_xor(v, flip);
  }

  static Int load_u8(const uint8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    const Int zero = _mm_setzero_si128();
    return _mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(quad), zero), zero);
  }
  static Int load_s8(const uint8_t* p) { return _mm_srai_epi32(_mm_slli_epi32(load_u8(p), 24), 24); }
  template <bool SIGNED>
  static void store_bytes(uint8_t* p, const Int (&v)[4]) { store(p, pack<SIGNED>(v[0], v[1], v[2], v[3])); }

  static Int as_int(Float v) { return _mm_castps_si128(v); }
  static Float as_float(Int v) { return _mm_castsi128_ps(v); }
  static Float set_float(float v) { return _mm_set1_ps(v); }
  static Float load_float(const float* p) { return _mm_loadu_ps(p); }
  static void store_float(float* p, Float v) { _mm_storeu_ps(p, v); }
  static Float to_float(Int v) { return _mm_cvtepi32_ps(v); }
  static Int round(Float v) { return _mm_cvtps_epi32(v); }
  static Float add(Float a, Float b) { return _mm_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm_mul_ps(a, b); }
  static Float max(Float a, Float b) { return _mm_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm_min_ps(a, b); }
};

}  // namespace
}  // namespace cnncomp
#elif defined(__aarch64__) && !defined(CNNCOMP_PORTABLE)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif
