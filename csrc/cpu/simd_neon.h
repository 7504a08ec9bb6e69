// Vec128 in NEON, for 64-bit ARM. See simd128.h for what is what.
//
// dot of u8 by s8: USDOT where the translation unit may use FEAT_I8MM. Else SDOT (FEAT_DotProd), which multiplies s8 by s8:
// x - 128 is x with its top bit flipped, and 128 * w is put back by a vector that comes with the weights. Else widening
// multiplications of 16-bit halves. All are exact.
// round gives 0 for NaN and the nearest int32 for what is beyond.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace cnncomp {
namespace {

struct Vec128 {
  using Int = int32x4_t;
  using Float = float32x4_t;
  static constexpr int kBytes = 16;
  static constexpr int kLanes = 4;
  static constexpr bool kSplits = false, kSaturates = false;

#if defined(__ARM_FEATURE_MATMUL_INT8)
  using Operand = Int;
  static Operand input(Int x) { return x; }
  static Operand weight(Int w) { return w; }
  static Int dot(Int acc, Operand x, Operand w) { return vusdotq_s32(acc, u8(x), s8(w)); }
#elif defined(__ARM_FEATURE_DOTPROD)
  struct Operand {
    Int bytes, sums;  // sums: of a weight's lanes, times 128
  };
  static Operand input(Int x) { return {flip(x), Int{}}; }
  static Operand weight(Int w) {
    const int8x16_t half = vdupq_n_s8(64);
    return {w, vdotq_s32(vdotq_s32(Int{}, s8(w), half), s8(w), half)};
  }
  static Int dot(Int acc, Operand x, Operand w) { return vdotq_s32(vaddq_s32(acc, w.sums), s8(x.bytes), s8(w.bytes)); }
#else
  struct Operand {
    int16x8_t even, odd;
  };
  static Operand input(Int x) {
    return {vreinterpretq_s16_u16(vandq_u16(vreinterpretq_u16_s32(x), vdupq_n_u16(0xff))),
            vreinterpretq_s16_u16(vshrq_n_u16(vreinterpretq_u16_s32(x), 8))};
  }
  static Operand weight(Int w) { return {vshrq_n_s16(vshlq_n_s16(s16(w), 8), 8), vshrq_n_s16(s16(w), 8)}; }
  static Int dot(Int acc, Operand x, Operand w) {
    const Int lo = vmlal_s16(vmull_s16(vget_low_s16(x.even), vget_low_s16(w.even)), vget_low_s16(x.odd), vget_low_s16(w.odd));
    const Int hi = vmlal_high_s16(vmull_high_s16(x.even, w.even), x.odd, w.odd);
    return vaddq_s32(acc, vpaddq_s32(lo, hi));
  }
#endif

  static Int broadcast(const uint8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return set(quad);
  }
  static Int set(int32_t v) { return vdupq_n_s32(v); }
  static Int load(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
  static void store(void* p, Int v) { vst1q_u8(static_cast<uint8_t*>(p), u8(v)); }
  static Int bit_xor(Int a, Int b) { return veorq_s32(a, b); }
  static Int bit_or(Int a, Int b) { return vorrq_s32(a, b); }
  static Int bit_and(Int a, Int b) { return vandq_s32(a, b); }
  static Int add_int(Int a, Int b) { return vaddq_s32(a, b); }
  template <int N>
  static Int shift_left(Int a) { return vshlq_n_s32(a, N); }
  template <int N>
  static Int shift_right(Int a) { return vshrq_n_s32(a, N); }

  static Int zip8_lo(Int a, Int b) { return vreinterpretq_s32_s8(vzip1q_s8(s8(a), s8(b))); }
  static Int zip8_hi(Int a, Int b) { return vreinterpretq_s32_s8(vzip2q_s8(s8(a), s8(b))); }
  static Int zip16_lo(Int a, Int b) { return vreinterpretq_s32_s16(vzip1q_s16(s16(a), s16(b))); }
  static Int zip16_hi(Int a, Int b) { return vreinterpretq_s32_s16(vzip2q_s16(s16(a), s16(b))); }
  static Int zip32_lo(Int a, Int b) { return vzip1q_s32(a, b); }
  static Int zip32_hi(Int a, Int b) { return vzip2q_s32(a, b); }
  static Int zip64_lo(Int a, Int b) { return vreinterpretq_s32_s64(vzip1q_s64(s64(a), s64(b))); }
  static Int zip64_hi(Int a, Int b) { return vreinterpretq_s32_s64(vzip2q_s64(s64(a), s64(b))); }
  static Int load_rows(const uint8_t* const* rows, int64_t at) { return load(rows[0] + at); }
  static Int load_lanes(const uint8_t* p, int64_t step) { return load(p); }
  static void store_lanes(uint8_t* p, int64_t step, Int v) { store(p, v); }
  template <bool SIGNED>
  static Int pack(Int a, Int b, Int c, Int d) {
    const int16x8_t ab = vqmovn_high_s32(vqmovn_s32(a), b), cd = vqmovn_high_s32(vqmovn_s32(c), d);
    return SIGNED ? vreinterpretq_s32_s8(vqmovn_high_s16(vqmovn_s16(ab), cd))
                  : vreinterpretq_s32_u8(vqmovun_high_s16(vqmovun_s16(ab), cd));
  }
  template <int I, int COUNT>
  static void store_part(void* p, Int v) { store(p, v); }

  static Int in_order(Int v) { return v; }
  template <bool SIGNED>
  static Int clamp_bytes(Int v, Int lo, Int hi) {
    return SIGNED ? vreinterpretq_s32_s8(vminq_s8(vmaxq_s8(s8(v), s8(lo)), s8(hi)))
                  : vreinterpretq_s32_u8(vminq_u8(vmaxq_u8(u8(v), u8(lo)), u8(hi)));
  }

  static Int load_u8(const uint8_t* p) {
    uint32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(quad)))));
  }
  static Int load_s8(const uint8_t* p) {
    uint32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(quad))));
  }
  template <bool SIGNED>
  static void store_bytes(uint8_t* p, const Int (&v)[4]) { store(p, pack<SIGNED>(v[0], v[1], v[2], v[3])); }

  static Int as_int(Float v) { return vreinterpretq_s32_f32(v); }
  static Float as_float(Int v) { return vreinterpretq_f32_s32(v); }
  static Float set_float(float v) { return vdupq_n_f32(v); }
  static Float load_float(const float* p) { return vld1q_f32(p); }
  static void store_float(float* p, Float v) { vst1q_f32(p, v); }
  static Float to_float(Int v) { return vcvtq_f32_s32(v); }
  static Int round(Float v) { return vcvtnq_s32_f32(v); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float sub(Float a, Float b) { return vsubq_f32(a, b); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  // The instructions FMAX and FMIN would give NaN where either is.
  static Float max(Float a, Float b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static Float min(Float a, Float b) { return vbslq_f32(vcltq_f32(a, b), a, b); }

 protected:
  static int8x16_t s8(Int v) { return vreinterpretq_s8_s32(v); }
  static uint8x16_t u8(Int v) { return vreinterpretq_u8_s32(v); }
  static int16x8_t s16(Int v) { return vreinterpretq_s16_s32(v); }
  static int64x2_t s64(Int v) { return vreinterpretq_s64_s32(v); }
  static Int flip(Int x) { return veorq_s32(x, set(static_cast<int32_t>(0x80808080u))); }
};

#if defined(__ARM_FEATURE_DOTPROD)
// dot leaves the 128 * w out: for kernels whose sums start from them.
struct Vec128Less128 : Vec128 {
  using Operand = Int;
  static Operand input(Int x) { return flip(x); }
  static Operand weight(Int w) { return w; }
  static Int dot(Int acc, Operand x, Operand w) { return vdotq_s32(acc, s8(x), s8(w)); }
};
#endif

}  // namespace
}  // namespace cnncomp
