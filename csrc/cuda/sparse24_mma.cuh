// mma.sp: a 2:4 sparse left operand, from sm_80 on. Before, the kernels are there and do nothing: a plan refuses such devices.
#pragma once

#include "cuda/arch.cuh"

namespace cnncomp::cuda {

// What the right operand, activations, is made of; the left one, weights, is s8 for 8 bits, else the same.
enum class Operand { kUint8, kInt8, kFloat16, kBfloat16 };

#define CNNCOMP_MMA_SP(SHAPE, TYPES, REGISTER, SELECTOR)                                                             \
  asm volatile("mma.sp::ordered_metadata.sync.aligned." SHAPE ".row.col." TYPES                                      \
               " {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9,%10,%11},{%0,%1,%2,%3},%12," SELECTOR ";"                       \
               : "+" REGISTER(d[0]), "+" REGISTER(d[1]), "+" REGISTER(d[2]), "+" REGISTER(d[3])                      \
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata))

// d(16 x 8) += a(16 x 64 bytes, half of them kept) * b(64 bytes x 8). kHalf: which half of a step of 128 bytes, whose metadata
// 16-bit operands share one register.
template <Operand kOperand, int kHalf, typename Sum>
__device__ __forceinline__ void multiply_sparse(Sum (&d)[4], const uint4& a, const uint32_t (&b)[4], uint32_t metadata) {
#if !CNNCOMP_TURING
  if constexpr (kOperand == Operand::kInt8) {
    CNNCOMP_MMA_SP("m16n8k64", "s32.s8.s8.s32", "r", "0x0");
  } else if constexpr (kOperand == Operand::kUint8) {
    CNNCOMP_MMA_SP("m16n8k64", "s32.s8.u8.s32", "r", "0x0");
  } else if constexpr (kOperand == Operand::kFloat16 && kHalf == 0) {
    CNNCOMP_MMA_SP("m16n8k32", "f32.f16.f16.f32", "f", "0x0");
  } else if constexpr (kOperand == Operand::kFloat16) {
    CNNCOMP_MMA_SP("m16n8k32", "f32.f16.f16.f32", "f", "0x1");
  } else if constexpr (kHalf == 0) {
    CNNCOMP_MMA_SP("m16n8k32", "f32.bf16.bf16.f32", "f", "0x0");
  } else {
    CNNCOMP_MMA_SP("m16n8k32", "f32.bf16.bf16.f32", "f", "0x1");
  }
#endif
}

#undef CNNCOMP_MMA_SP

}  // namespace cnncomp::cuda
