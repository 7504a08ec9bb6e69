// int8 convolution of NHWC images with 2:4 sparse weights, packed by cnncomp/sparsity/two_four.py; linear layers are ones of
// 1 x 1 images. An implicit GEMM on mma.sp, sm_80 and later.

#include "cuda/sparse24_tile.cuh"

namespace cnncomp::cuda {

template <typename Tile, bool kSigned>
__global__ void __launch_bounds__(Tile::kThreads) conv2d_sparse24_int8_kernel(const Sparse24Params p) {
  extern __shared__ __align__(128) int8_t stages[];
  Sparse24Sums<Tile, int32_t> acc = {};
  constexpr Operand kOperand = kSigned ? Operand::kInt8 : Operand::kUint8;
  sparse24_main_loop<Tile, kOperand>(acc, p, shared_address(stages));
  store_sparse24(acc, p);
}

namespace {

// Warps of 64 x 64 read the least from shared memory for each product. Two blocks of them want 160 KB of a multiprocessor; with
// less, eight warps in one block, or two stages, keep as many warps there.
using Wide = Sparse24Tile<128, 128, 64, 3, 1>;
using WideInLess = Sparse24Tile<128, 128, 32, 3, 1>;
using Narrow = Sparse24Tile<128, 64, 32, 3, 1>;
using NarrowInLess = Sparse24Tile<128, 64, 32, 2, 1>;
using Small = Sparse24Tile<64, 64, 16, 3, 1>;
constexpr int kEnoughShared = 2 * (Wide::kStages * Wide::kStageBytes + 1024);

template <typename Tile>
Launch plan_tile(const Conv2d& conv) {
  Launch launch;
  launch.kernel = "conv2d_sparse24_int8_" + Tile::name() + (conv.x_signed ? "_s8" : "_u8");
  launch.function = conv.x_signed ? reinterpret_cast<const void*>(&conv2d_sparse24_int8_kernel<Tile, true>)
                                  : reinterpret_cast<const void*>(&conv2d_sparse24_int8_kernel<Tile, false>);
  set_sparse24<Tile>(launch, conv);
  return launch;
}

}  // namespace

Launch plan_conv2d_sparse24_int8(const Conv2d& conv, int multiprocessors, int shared) {
  const int64_t pixels = static_cast<int64_t>(conv.n) * conv.p() * conv.q();
  const int32_t k_group = conv.k / conv.groups;
  const bool enough = shared >= kEnoughShared;
  auto blocks = [&](int block_c, int block_p) { return ceil_div(k_group, block_c) * ceil_div(pixels, block_p) * conv.groups; };
  if (k_group > Small::kBlockC && blocks(Wide::kBlockC, Wide::kBlockP) >= multiprocessors)
    return enough ? plan_tile<Wide>(conv) : plan_tile<WideInLess>(conv);
  if (k_group > Small::kBlockC && blocks(Narrow::kBlockC, Narrow::kBlockP) >= multiprocessors)
    return enough ? plan_tile<Narrow>(conv) : plan_tile<NarrowInLess>(conv);
  return plan_tile<Small>(conv);
}

}  // namespace cnncomp::cuda
