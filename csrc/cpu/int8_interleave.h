// Bytes of four vectors as the four bytes of 32-bit lanes. Included by the int8 translation units of each instruction set.
#pragma once

#include "int8_kernels.h"

namespace cnncomp {
namespace {

// Within each 128 bits, v[j] holds elements 4j..4j+3 of a, b, c and d; packing the results of the lanes to bytes undoes it.
template <class S>
inline __attribute__((always_inline)) void interleave(typename S::Int a, typename S::Int b, typename S::Int c,
                                                      typename S::Int d, typename S::Int (&v)[4]) {
  const auto ab_lo = S::zip8_lo(a, b), ab_hi = S::zip8_hi(a, b), cd_lo = S::zip8_lo(c, d), cd_hi = S::zip8_hi(c, d);
  v[0] = S::zip16_lo(ab_lo, cd_lo);
  v[1] = S::zip16_hi(ab_lo, cd_lo);
  v[2] = S::zip16_lo(ab_hi, cd_hi);
  v[3] = S::zip16_hi(ab_hi, cd_hi);
}

}  // namespace
}  // namespace cnncomp
