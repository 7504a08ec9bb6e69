// int8 convolution of NHWC images with block sparse weights, packed by cnncomp/sparsity/gathered.py: a gathered implicit GEMM,
// sm_80 and later. Linear layers are ones of 1 x 1 images.

#include "cuda/gathered_plan.cuh"

namespace cnncomp::cuda {

template <typename Tile, bool kSigned>
__global__ void __launch_bounds__(Tile::kThreads) conv2d_blocks_int8_kernel(const Sparse24Params p) {
  extern __shared__ __align__(128) int8_t stages[];
  Sparse24Sums<Tile, int32_t> acc = {};
  gathered_main_loop<Tile, kSigned ? Operand::kInt8 : Operand::kUint8>(acc, p, shared_address(stages));
  store_sparse24<Tile, uint8_t>(acc, p);
}

Launch plan_conv2d_blocks_int8(const Conv2d& conv, int multiprocessors, int shared) {
  return plan_gathered<1>(conv, multiprocessors, shared, [&](auto tile) {
    using Tile = decltype(tile);
    Launch launch;
    launch.kernel = "conv2d_blocks_int8_" + Tile::name() + (conv.x_signed ? "_s8" : "_u8");
    launch.function = conv.x_signed ? reinterpret_cast<const void*>(&conv2d_blocks_int8_kernel<Tile, true>)
                                    : reinterpret_cast<const void*>(&conv2d_blocks_int8_kernel<Tile, false>);
    set_sparse24<Tile>(launch, conv);
    return launch;
  });
}

}  // namespace cnncomp::cuda
