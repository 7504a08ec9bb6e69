// float16 or bfloat16 convolution with weights in runs of 32 outputs, packed by cnncomp/sparsity/vectors.py, sums in float32, on
// sm_80 and later.

#include <type_traits>

#include "cuda/vectors_plan.cuh"

namespace cnncomp::cuda {

template <typename Tile, bool kBfloat16>
__global__ void __launch_bounds__(Tile::kThreads, 4) conv2d_vectors_f16_kernel(const VectorsParams p) {
  extern __shared__ __align__(128) int8_t stages[];
  VectorsSums<Tile, float> acc = {};
  const VectorsPlace<Tile> place(p);
  constexpr Operand kOperand = kBfloat16 ? Operand::kBfloat16 : Operand::kFloat16;
  vectors_main_loop<Tile>(p, place, shared_address(stages), [&](uint32_t values, uint32_t rows, int first) {
    multiply_piece<Tile, kOperand>(acc, values, rows, first);
  });
  store_outputs<Tile, std::conditional_t<kBfloat16, __nv_bfloat16, __half>>(acc, p, place);
}

Launch plan_conv2d_vectors_f16(const Conv2d& conv, int multiprocessors, int shared) {
  check_half_types(conv, "conv2d_vectors_f16");
  const bool bfloat16 = conv.x_dtype == DType::kBfloat16;
  return plan_vectors<2>(conv, multiprocessors, shared, [&](auto tile) {
    using Tile = decltype(tile);
    Launch launch;
    launch.kernel = "conv2d_vectors_f16_" + Tile::name() + (bfloat16 ? "_bf16" : "_f16");
    launch.function = bfloat16 ? reinterpret_cast<const void*>(&conv2d_vectors_f16_kernel<Tile, true>)
                               : reinterpret_cast<const void*>(&conv2d_vectors_f16_kernel<Tile, false>);
    set_vectors<Tile>(launch, conv);
    return launch;
  });
}

}  // namespace cnncomp::cuda
