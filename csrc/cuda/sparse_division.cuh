// Division of numbers below 2^31 by a divisor that the host knows: a multiplication. Granlund and Montgomery, "Division by
// invariant integers using multiplication", PLDI 1994, figure 4.2 for 31-bit dividends.
#pragma once

#include <cstdint>

namespace cnncomp::cuda {

struct Divisor {
  int32_t value;
  uint32_t multiplier, shift;
};

inline Divisor divisor(int32_t value) {
  uint32_t shift = 0;
  while (shift < 31 && (1u << shift) < static_cast<uint32_t>(value)) ++shift;
  // 2^(31 + shift) / value, rounded up, is below 2^32 and exact enough for 31 bits.
  const uint64_t multiplier = ((uint64_t{1} << (31 + shift)) + value - 1) / value;
  return {value, static_cast<uint32_t>(multiplier), shift};
}

__device__ __forceinline__ int divide(int number, const Divisor& by) {
  return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(number)) * by.multiplier >> (31 + by.shift));
}

}  // namespace cnncomp::cuda
