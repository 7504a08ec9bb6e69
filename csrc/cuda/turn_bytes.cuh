#pragma once

#include <cstdint>

namespace cnncomp::cuda {

// Byte j of each of four words into word j.
__device__ __forceinline__ void turn_bytes(uint32_t (&v)[4]) {
  const uint32_t low01 = __byte_perm(v[0], v[1], 0x5140), low23 = __byte_perm(v[2], v[3], 0x5140);
  const uint32_t high01 = __byte_perm(v[0], v[1], 0x7362), high23 = __byte_perm(v[2], v[3], 0x7362);
  v[0] = __byte_perm(low01, low23, 0x5410), v[1] = __byte_perm(low01, low23, 0x7632);
  v[2] = __byte_perm(high01, high23, 0x5410), v[3] = __byte_perm(high01, high23, 0x7632);
}

}  // namespace cnncomp::cuda
