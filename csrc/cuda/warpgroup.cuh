// Products of a warpgroup, four warps, on sm_90a; nothing elsewhere.
#pragma once

#include "cuda/arch.cuh"

namespace cnncomp::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CNNCOMP_HOPPER 1
#define CNNCOMP_ON_HOPPER(...) __VA_ARGS__
#else
#define CNNCOMP_HOPPER 0
#define CNNCOMP_ON_HOPPER(...)
#endif

// What a thread wrote to shared memory, or had copied there, is seen by multiply_group of others behind the next barrier.
__device__ __forceinline__ void show_to_group() {
  CNNCOMP_ON_HOPPER(asm volatile("fence.proxy.async.shared::cta;" ::: "memory"));
}

// Before products that add to sums that other instructions wrote; after some; until those are there.
__device__ __forceinline__ void begin_products() {
  CNNCOMP_ON_HOPPER(asm volatile("wgmma.fence.sync.aligned;" ::: "memory"));
}
__device__ __forceinline__ void commit_products() {
  CNNCOMP_ON_HOPPER(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"));
}
__device__ __forceinline__ void wait_products() {
  CNNCOMP_ON_HOPPER(asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"));
}

// A sum that must not be read before what came before this, wait_products.
__device__ __forceinline__ void settle(int32_t& sum) { asm volatile("" : "+r"(sum)::"memory"); }

// Descriptor of a matrix in rows of 64 bytes, swizzled, eight of which are 512 bytes; address: of a chunk of the first row.
__device__ __forceinline__ uint64_t swizzled_matrix(uint32_t address) {
  return static_cast<uint64_t>(2u << 30 | 512 >> 4) << 32 | (1u << 16 | (address >> 4 & 0x3fff));
}

#define CNNCOMP_SUMS(j) "+r"(d[j][0]), "+r"(d[j][1]), "+r"(d[j][2]), "+r"(d[j][3])
#define CNNCOMP_SUMS_8(j) \
  CNNCOMP_SUMS(j), CNNCOMP_SUMS(j + 1), CNNCOMP_SUMS(j + 2), CNNCOMP_SUMS(j + 3), CNNCOMP_SUMS(j + 4), CNNCOMP_SUMS(j + 5), \
      CNNCOMP_SUMS(j + 6), CNNCOMP_SUMS(j + 7)
#define CNNCOMP_WGMMA(A, N, D, PLACE_A, PLACE_B) \
  "{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n" N "k32.s32." A ".s8 " D ", " PLACE_A ", " PLACE_B \
  ", add; }"
#define CNNCOMP_D_32 \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define CNNCOMP_D_64                                                                                                          \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,"   \
  "%61,%62,%63}"

// d(64 x 64 or 128, s32) += a(64 x 32, s8 or u8) * b(64 or 128 x 32, s8) transposed, by four warps; each has 16 rows of d, as of
// multiply. Asynchronous: d is there after wait_products.
template <bool kSigned>
__device__ __forceinline__ void multiply_group(int32_t (&d)[8][4], uint64_t a, uint64_t b) {
  if constexpr (kSigned)
    CNNCOMP_ON_HOPPER(asm volatile(CNNCOMP_WGMMA("s8", "64", CNNCOMP_D_32, "%32", "%33") : CNNCOMP_SUMS_8(0) : "l"(a), "l"(b)));
  else
    CNNCOMP_ON_HOPPER(asm volatile(CNNCOMP_WGMMA("u8", "64", CNNCOMP_D_32, "%32", "%33") : CNNCOMP_SUMS_8(0) : "l"(a), "l"(b)));
}
template <bool kSigned>
__device__ __forceinline__ void multiply_group(int32_t (&d)[16][4], uint64_t a, uint64_t b) {
  if constexpr (kSigned)
    CNNCOMP_ON_HOPPER(asm volatile(CNNCOMP_WGMMA("s8", "128", CNNCOMP_D_64, "%64", "%65")
                 : CNNCOMP_SUMS_8(0), CNNCOMP_SUMS_8(8)
                 : "l"(a), "l"(b)));
  else
    CNNCOMP_ON_HOPPER(asm volatile(CNNCOMP_WGMMA("u8", "128", CNNCOMP_D_64, "%64", "%65")
                 : CNNCOMP_SUMS_8(0), CNNCOMP_SUMS_8(8)
                 : "l"(a), "l"(b)));
}

#undef CNNCOMP_SUMS
#undef CNNCOMP_SUMS_8
#undef CNNCOMP_WGMMA
#undef CNNCOMP_D_32
#undef CNNCOMP_D_64
#undef CNNCOMP_ON_HOPPER

}  // namespace cnncomp::cuda
