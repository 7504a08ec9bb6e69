// int8 convolution of NHWC images as an implicit GEMM on tensor cores: pixels x (r * s * c) times channels x (r * s * c).
// Groups are the grid's third dimension. Channels (of a group) that aren't a multiple of 16 are read byte by byte.

#include "cuda/loader.cuh"

namespace cnncomp::cuda {

template <typename Tile, bool kSigned, bool kBytes>
__global__ void __launch_bounds__(Tile::kThreads) conv2d_int8_kernel(const ConvParams p) {
  __shared__ SharedTiles<Tile> shared;
  Accumulators<Tile> acc = {};
  const int64_t m0 = static_cast<int64_t>(blockIdx.x) * Tile::kBlockM;
  using LoaderA = std::conditional_t<kBytes, ConvByteLoader<Tile>, ConvLoader<Tile>>;
  using LoaderB = std::conditional_t<kBytes, RowByteLoader<Tile, Tile::kRowsB>, RowLoader<Tile, Tile::kRowsB>>;
  LoaderPair<LoaderA, LoaderB> loader{
      LoaderA(p, m0, blockIdx.z),
      LoaderB(p.weight, p.reduction, [&](int row) { return weight_row<Tile>(row, p.k_group); })};
  main_loop<Tile, kSigned>(acc, shared, loader, (p.reduction + Tile::kBlockK - 1) / Tile::kBlockK);
  store_tile(acc, p.epilogue, static_cast<int64_t>(p.n) * p.p * p.q);
}

namespace {

template <typename Tile, bool kBytes>
Launch plan_tile(const Conv2d& conv, int64_t m) {
  Launch launch;
  launch.kernel = "conv2d_int8_" + Tile::name() + (conv.x_signed ? "_s8" : "_u8") + (kBytes ? "_bytes" : "");
  launch.function = conv.x_signed ? reinterpret_cast<const void*>(&conv2d_int8_kernel<Tile, true, kBytes>)
                                  : reinterpret_cast<const void*>(&conv2d_int8_kernel<Tile, false, kBytes>);
  set_grid<Tile>(launch, m, conv.k / conv.groups, conv.groups);
  launch.set_params(conv_params(conv, epilogue_params(conv, conv.k / conv.groups, Tile::kVec)));
  return launch;
}

}  // namespace

Launch plan_conv2d_int8(const Conv2d& conv, int multiprocessors) {
  const int32_t c_group = conv.c / conv.groups, k_group = conv.k / conv.groups;
  if (c_group == 1 && conv.groups > 1) return plan_depthwise_int8(conv);
  const int64_t m = static_cast<int64_t>(conv.n) * conv.p() * conv.q();
  const bool chunks = c_group % 16 == 0 && aligned(conv.x, 16) && aligned(conv.weight, 16);
  if (!chunks) return plan_tile<SmallTile, true>(conv, m);
  if (conv.pointwise()) return plan_gemm_int8(conv, multiprocessors);
  return large_tile_fits(m, k_group, conv.groups, multiprocessors) ? plan_tile<LargeTile, false>(conv, m)
                                                                   : plan_tile<SmallTile, false>(conv, m);
}

}  // namespace cnncomp::cuda
