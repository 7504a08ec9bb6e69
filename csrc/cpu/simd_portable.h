// Vec128 in GCC's and Clang's vector types, for processors without SSE2 and NEON. Little endian. See simd128.h for what is what.
#pragma once

#include <cstdint>

namespace cnncomp {
namespace {

struct Vec128 {
  typedef int32_t Int __attribute__((vector_size(16)));
  typedef float Float __attribute__((vector_size(16)));
  typedef int16_t Words __attribute__((vector_size(16)));
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef uint32_t Unsigned __attribute__((vector_size(16)));
  static constexpr int kBytes = 16;
  static constexpr int kLanes = 4;
  static constexpr bool kSplits = false, kSaturates = false;

  struct Operand {
    Int byte[4];
  };
  static Operand input(Int x) { return {{x & 255, (x >> 8) & 255, (x >> 16) & 255, (x >> 24) & 255}}; }
  static Operand weight(Int w) { return {{byte<0>(w), byte<1>(w), byte<2>(w), byte<3>(w)}}; }
  static Int dot(Int acc, Operand x, Operand w) {
    for (int i = 0; i < 4; i++) acc += x.byte[i] * w.byte[i];
    return acc;
  }

  static Int broadcast(const uint8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return set(quad);
  }
  static Int set(int32_t v) { return Int{v, v, v, v}; }
  static Int load(const void* p) {
    Int v;
    __builtin_memcpy(&v, p, 16);
    return v;
  }
  static void store(void* p, Int v) { __builtin_memcpy(p, &v, 16); }
  static Int bit_xor(Int a, Int b) { return a ^ b; }
  static Int bit_or(Int a, Int b) { return a | b; }
  static Int bit_and(Int a, Int b) { return a & b; }
  static Int add_int(Int a, Int b) { return a + b; }
  template <int N>
  static Int shift_left(Int a) { return Int(Unsigned(a) << N); }
  template <int N>
  static Int shift_right(Int a) { return a >> N; }

  static Int zip8_lo(Int a, Int b) {
    return Int(__builtin_shufflevector(Bytes(a), Bytes(b), 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  }
  static Int zip8_hi(Int a, Int b) {
    return Int(
        __builtin_shufflevector(Bytes(a), Bytes(b), 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
  }
  static Int zip16_lo(Int a, Int b) { return Int(__builtin_shufflevector(Words(a), Words(b), 0, 8, 1, 9, 2, 10, 3, 11)); }
  static Int zip16_hi(Int a, Int b) {
    return Int(__builtin_shufflevector(Words(a), Words(b), 4, 12, 5, 13, 6, 14, 7, 15));
  }
  static Int zip32_lo(Int a, Int b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
  static Int zip32_hi(Int a, Int b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
  static Int zip64_lo(Int a, Int b) { return __builtin_shufflevector(a, b, 0, 1, 4, 5); }
  static Int zip64_hi(Int a, Int b) { return __builtin_shufflevector(a, b, 2, 3, 6, 7); }
  static Int load_rows(const uint8_t* const* rows, int64_t at) { return load(rows[0] + at); }
  static Int load_lanes(const uint8_t* p, int64_t step) { return load(p); }
  static void store_lanes(uint8_t* p, int64_t step, Int v) { store(p, v); }
  template <bool SIGNED>
  static Int saturate(Int v) {
    const Int lo = set(SIGNED ? -128 : 0), hi = set(SIGNED ? 127 : 255);
    v = v < lo ? lo : v;
    return v > hi ? hi : v;
  }
  template <bool SIGNED>
  static Int pack(Int a, Int b, Int c, Int d) {
    a = saturate<SIGNED>(a), b = saturate<SIGNED>(b), c = saturate<SIGNED>(c), d = saturate<SIGNED>(d);
    const Words ab = __builtin_shufflevector(Words(a), Words(b), 0, 2, 4, 6, 8, 10, 12, 14);
    const Words cd = __builtin_shufflevector(Words(c), Words(d), 0, 2, 4, 6, 8, 10, 12, 14);
    return Int(__builtin_shufflevector(Bytes(ab), Bytes(cd), 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
  }
  template <int I, int COUNT>
  static void store_part(void* p, Int v) { store(p, v); }

  static Int in_order(Int v) { return v; }
  template <bool SIGNED>
  static Int clamp_bytes(Int v, Int lo, Int hi) {
    const uint8_t flip = SIGNED ? 0x80 : 0;
    const Bytes low = Bytes(lo) ^ flip, high = Bytes(hi) ^ flip;
    Bytes b = Bytes(v) ^ flip;
    b = b < low ? low : b;
    b = b > high ? high : b;
    return Int(b ^ flip);
  }

  static Int load_u8(const uint8_t* p) { return Int{p[0], p[1], p[2], p[3]}; }
  static Int load_s8(const uint8_t* p) {
    return Int{int8_t(p[0]), int8_t(p[1]), int8_t(p[2]), int8_t(p[3])};
  }
  template <bool SIGNED>
  static void store_bytes(uint8_t* p, const Int (&v)[4]) { store(p, pack<SIGNED>(v[0], v[1], v[2], v[3])); }

  static Int as_int(Float v) { return Int(v); }
  static Float as_float(Int v) { return Float(v); }
  static Float set_float(float v) { return Float{v, v, v, v}; }
  static Float load_float(const float* p) { return Float(load(p)); }
  static void store_float(float* p, Float v) { store(p, Int(v)); }
  static Float to_float(Int v) { return __builtin_convertvector(v, Float); }
  static Int round(Float v) {
    // In [2^23, 2^24) floats are the integers: adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits.
    constexpr float kMagic = 12582912.0f;
    return Int(v + kMagic) - Int(set_float(kMagic));
  }
  static Float add(Float a, Float b) { return a + b; }
  static Float sub(Float a, Float b) { return a - b; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float max(Float a, Float b) { return a > b ? a : b; }
  static Float min(Float a, Float b) { return a < b ? a : b; }

 private:
  template <int I>
  static Int byte(Int w) { return Int(Unsigned(w) << (24 - 8 * I)) >> 24; }
};

}  // namespace
}  // namespace cnncomp
