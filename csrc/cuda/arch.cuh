// What differs between architectures, and nothing else: asynchronous copies, matrix loads, 8-bit matrix multiply.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cnncomp::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define CNNCOMP_TURING 1
#else
#define CNNCOMP_TURING 0
#endif

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Shared memory is addressed by 32-bit addresses; constants added to them end up in the instruction's own offset.

__device__ __forceinline__ void store_shared(uint32_t dst, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(dst), "r"(word) : "memory");
}

// 16 bytes from global to shared memory, zeros where `real` is false (src is not read then, but must be a valid pointer).
// sm_80 and later: asynchronous, part of the current group; before: at once.
__device__ __forceinline__ void copy_async_16(uint32_t dst, const void* src, bool real) {
#if CNNCOMP_TURING
  const uint4 v = real ? __ldg(static_cast<const uint4*>(src)) : make_uint4(0, 0, 0, 0);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(real ? 16 : 0)
               : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() {
#if !CNNCOMP_TURING
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if !CNNCOMP_TURING
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Four 8 x 16-byte matrices; lane 8 * i + j gives the address of row j of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

#define CNNCOMP_MMA_16832(A)                                                                                      \
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." A ".s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" \
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#define CNNCOMP_MMA_8816(A, D0, D1, A0, B0)                                                \
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32." A ".s8.s32 {%0,%1},{%2},{%3},{%0,%1};" \
               : "+r"(D0), "+r"(D1)                                                         \
               : "r"(A0), "r"(B0))

// d(16 x 8, s32) += a(16 x 32, s8 or u8) * b(32 x 8, s8). On sm_75 four m8n8k16, whose fragments are the same registers.
template <bool kSigned>
__device__ __forceinline__ void multiply(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if CNNCOMP_TURING
  if constexpr (kSigned) {
    CNNCOMP_MMA_8816("s8", d[0], d[1], a[0], b0);
    CNNCOMP_MMA_8816("s8", d[2], d[3], a[1], b0);
    CNNCOMP_MMA_8816("s8", d[0], d[1], a[2], b1);
    CNNCOMP_MMA_8816("s8", d[2], d[3], a[3], b1);
  } else {
    CNNCOMP_MMA_8816("u8", d[0], d[1], a[0], b0);
    CNNCOMP_MMA_8816("u8", d[2], d[3], a[1], b0);
    CNNCOMP_MMA_8816("u8", d[0], d[1], a[2], b1);
    CNNCOMP_MMA_8816("u8", d[2], d[3], a[3], b1);
  }
#else
  if constexpr (kSigned) {
    CNNCOMP_MMA_16832("s8");
  } else {
    CNNCOMP_MMA_16832("u8");
  }
#endif
}

#undef CNNCOMP_MMA_16832
#undef CNNCOMP_MMA_8816

}  // namespace cnncomp::cuda
