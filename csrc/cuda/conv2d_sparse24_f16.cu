// float16 or bfloat16 convolution of NHWC images with 2:4 sparse weights, packed by cnncomp/sparsity/two_four.py, sums in float32;
// linear layers are ones of 1 x 1 images. An implicit GEMM on mma.sp, sm_80 and later.

#include <type_traits>

#include "cuda/sparse24_plan.cuh"

namespace cnncomp::cuda {

template <typename Tile, bool kBfloat16>
__global__ void __launch_bounds__(Tile::kThreads) conv2d_sparse24_f16_kernel(const Sparse24Params p) {
  extern __shared__ __align__(128) int8_t stages[];
  Sparse24Sums<Tile, float> acc = {};
  constexpr Operand kOperand = kBfloat16 ? Operand::kBfloat16 : Operand::kFloat16;
  sparse24_main_loop<Tile, kOperand>(acc, p, shared_address(stages));
  store_sparse24<Tile, std::conditional_t<kBfloat16, __nv_bfloat16, __half>>(acc, p);
}

Launch plan_conv2d_sparse24_f16(const Conv2d& conv, int multiprocessors, int shared) {
  check_half_types(conv, "conv2d_sparse24_f16");
  const bool bfloat16 = conv.x_dtype == DType::kBfloat16;
  return plan_sparse24<2>(conv, multiprocessors, shared, [&](auto tile) {
    using Tile = decltype(tile);
    Launch launch;
    launch.kernel = "conv2d_sparse24_f16_" + Tile::name() + (bfloat16 ? "_bf16" : "_f16");
    launch.function = bfloat16 ? reinterpret_cast<const void*>(&conv2d_sparse24_f16_kernel<Tile, true>)
                               : reinterpret_cast<const void*>(&conv2d_sparse24_f16_kernel<Tile, false>);
    set_sparse24<Tile>(launch, conv);
    return launch;
  });
}

}  // namespace cnncomp::cuda
