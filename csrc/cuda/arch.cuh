// What differs between architectures, and nothing else: asynchronous copies, matrix loads, 8-bit matrix multiply.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>
#include <utility>

namespace cnncomp::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define CNNCOMP_TURING 1
#else
#define CNNCOMP_TURING 0
#endif

// Makes a value opaque, so that it is kept and not computed again in each turn of a loop.
__device__ __forceinline__ void pin(uint32_t& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void pin(int64_t& v) { asm volatile("" : "+l"(v)); }
__device__ __forceinline__ void pin(const int8_t*& v) { asm volatile("" : "+l"(v)); }

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Shared memory is addressed by 32-bit addresses; kOffset is in the instruction and costs nothing.

__device__ __forceinline__ uint32_t load_shared(uint32_t src) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(src) : "memory");
  return word;
}

__device__ __forceinline__ void store_shared(uint32_t dst, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(dst), "r"(word) : "memory");
}

// Adds to a word of global memory, and doesn't wait for it.
__device__ __forceinline__ void add_global(int32_t* dst, int32_t value) {
  asm volatile("red.global.add.s32 [%0], %1;" ::"l"(dst), "r"(value) : "memory");
}

// kBytes (4, 8 or 16) from global to shared memory: `real` of them, which is kBytes or 0, and zeros for the rest. src is not
// read where real is 0, and may be anything then.
// sm_80 and later: asynchronous, part of the current group; before: at once.
template <int kBytes, int kOffset = 0>
__device__ __forceinline__ void copy_async(uint32_t dst, const int8_t* src, uint32_t real) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async copies");
#if CNNCOMP_TURING
  if constexpr (kBytes == 16) {
    const uint4 v = real ? __ldg(reinterpret_cast<const uint4*>(src)) : make_uint4(0, 0, 0, 0);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(dst + kOffset), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  } else if constexpr (kBytes == 8) {
    const uint2 v = real ? __ldg(reinterpret_cast<const uint2*>(src)) : make_uint2(0, 0);
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(dst + kOffset), "r"(v.x), "r"(v.y) : "memory");
  } else {
    store_shared(dst + kOffset, real ? __ldg(reinterpret_cast<const uint32_t*>(src)) : 0);
  }
#else
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0+%3], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(real), "n"(kOffset)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0+%4], [%1], %2, %3;" ::"r"(dst), "l"(src), "n"(kBytes), "r"(real),
                 "n"(kOffset)
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
template <int kOffset>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row), "n"(kOffset)
               : "memory");
}

// f(0), f(1), ... f(kCount - 1), whose arguments are compile-time constants.
template <typename F, int... kIndices>
__device__ __forceinline__ void unroll(F&& f, std::integer_sequence<int, kIndices...>) {
  (f(std::integral_constant<int, kIndices>{}), ...);
}
template <int kCount, typename F>
__device__ __forceinline__ void unroll(F&& f) {
  unroll(f, std::make_integer_sequence<int, kCount>{});
}

// The larger and the smaller of two; NaN if either is, as in torch.
__device__ __forceinline__ float larger(float a, float b) {
#if CNNCOMP_TURING
  return a < b ? b : a != a ? a : b != b ? b : a;
#else
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#endif
}
__device__ __forceinline__ float smaller(float a, float b) {
#if CNNCOMP_TURING
  return a > b ? b : a != a ? a : b != b ? b : a;
#else
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#endif
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
