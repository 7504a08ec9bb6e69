// int8 convolution with V:2:M weights, packed by cnncomp/sparsity/vnm.py, on sm_80 and later.

#include "cuda/vnm_tile.cuh"

namespace cnncomp::cuda {

template <typename Tile, bool kSigned>
__global__ void __launch_bounds__(Tile::kThreads, 3) conv2d_vnm_int8_kernel(const VectorsParams p) {
  extern __shared__ __align__(128) int8_t stages[];
  VectorsSums<Tile, int32_t> acc = {};
  const VectorsPlace<Tile> place(p);
  constexpr Operand kOperand = kSigned ? Operand::kInt8 : Operand::kUint8;
  vectors_main_loop<Tile>(p, place, shared_address(stages), [&](uint32_t values, uint32_t rows, int first) {
    multiply_sparse_piece<Tile, kOperand>(acc, values, rows, first);
  });
  store_outputs<Tile, uint8_t>(acc, p, place);
}

Launch plan_conv2d_vnm_int8(const Conv2d& conv, int multiprocessors, int shared) {
  const auto plan = [&](auto tile) {
    using Tile = decltype(tile);
    Launch launch;
    launch.kernel = "conv2d_vnm_int8_" + Tile::name() + (conv.x_signed ? "_s8" : "_u8");
    launch.function = conv.x_signed ? reinterpret_cast<const void*>(&conv2d_vnm_int8_kernel<Tile, true>)
                                    : reinterpret_cast<const void*>(&conv2d_vnm_int8_kernel<Tile, false>);
    set_vectors<Tile>(launch, conv);
    return launch;
  };
  return conv.n > 8 ? plan_vnm<16, 1>(conv, multiprocessors, shared, plan) : plan_vnm<8, 1>(conv, multiprocessors, shared, plan);
}

}  // namespace cnncomp::cuda
