// int8 GEMM on tensor cores: out(m, k) = epilogue(x(m, c) * weight(k, c)^T). For linear layers and 1 x 1 convolutions
// whose channels are a multiple of 16.

#include "cuda/loader.cuh"

namespace cnncomp::cuda {

struct GemmParams {
  EpilogueParams epilogue;
  const int8_t* x;
  const int8_t* weight;
  int32_t m, c;
};

template <typename Tile, bool kSigned>
__global__ void __launch_bounds__(Tile::kThreads) gemm_int8_kernel(const GemmParams p) {
  __shared__ SharedTiles<Tile> shared;
  Accumulators<Tile> acc = {};
  const int64_t m0 = static_cast<int64_t>(blockIdx.x) * Tile::kBlockM;
  using LoaderA = RowLoader<Tile, Tile::kRowsA>;
  using LoaderB = RowLoader<Tile, Tile::kRowsB>;
  LoaderPair<LoaderA, LoaderB> loader{
      LoaderA(p.x, p.c, [&](int row) { return m0 + row < p.m ? m0 + row : -1; }),
      LoaderB(p.weight, p.c, [&](int row) { return weight_row<Tile>(row, p.epilogue.limit); })};
  main_loop<Tile, kSigned>(acc, shared, loader, (p.c + Tile::kBlockK - 1) / Tile::kBlockK);
  store_tile(acc, p.epilogue, p.m);
}

namespace {

template <typename Tile>
Launch plan_tile(const Conv2d& conv, int64_t m) {
  Launch launch;
  launch.kernel = "gemm_int8_" + Tile::name() + (conv.x_signed ? "_s8" : "_u8");
  launch.function = conv.x_signed ? reinterpret_cast<const void*>(&gemm_int8_kernel<Tile, true>)
                                  : reinterpret_cast<const void*>(&gemm_int8_kernel<Tile, false>);
  set_grid<Tile>(launch, m, conv.k, 1);
  launch.set_params(GemmParams{epilogue_params(conv, conv.k, Tile::kVec), static_cast<const int8_t*>(conv.x), conv.weight,
                               static_cast<int32_t>(m), conv.c});
  return launch;
}

}  // namespace

Launch plan_gemm_int8(const Conv2d& conv, int multiprocessors) {
  const int64_t m = static_cast<int64_t>(conv.n) * conv.h * conv.w;
  return large_tile_fits(m, conv.k, 1, multiprocessors) ? plan_tile<LargeTile>(conv, m) : plan_tile<SmallTile>(conv, m);
}

}  // namespace cnncomp::cuda
